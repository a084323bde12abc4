"""Each preset of conf/freeze trains exactly what it promises in its family, and is refused where a rule matches nothing."""

from pathlib import Path

import pytest
import yaml

from m4train import models
from m4train.config import FreezeConfig, FreezeRule
from m4train.errors import ConfigError
from m4train.training.freezing import apply_freezing
from m4train.training.naming import part_of
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3

CONF = Path(__file__).parents[3] / "conf" / "freeze"
FAMILIES = {
    "idefics": (models.IdeficsForVisionText2Text, models.IdeficsConfig, tiny_idefics),
    "idefics2": (models.Idefics2ForConditionalGeneration, models.Idefics2Config, tiny_idefics2),
    "idefics3": (models.Idefics3ForConditionalGeneration, models.Idefics3Config, tiny_idefics3),
}


def _model(family, **changes):
    kind, config, values = FAMILIES[family]
    return kind(config.from_dict(values(**changes)))


def _trainable(preset, model):
    """Names that train, after the preset as `build_model` applies it; new tokens begin at 90 in the tiny vocabulary."""
    given = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    config = FreezeConfig([FreezeRule(**rule) for rule in given["rules"]])
    if "new_rows_from" in given:
        model.split_token_rows(90)
    apply_freezing(model, config)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _parts(names, model):
    return {part_of(name, model.parts()) for name in names}


def _whole(names, model, *parts):
    """Whether every parameter of `parts` is among `names`."""
    return {n for n, _ in model.named_parameters() if part_of(n, model.parts()) in parts} <= names


@pytest.mark.parametrize("preset", ["full"])
def test_everything_trains_even_what_the_model_would_freeze(preset):
    model = _model("idefics", freeze_text_layers=True, freeze_vision_layers=True)
    assert len(_trainable(preset, model)) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["idefics2", "idefics3"])
def test_connector_only(family):
    model = _model(family)
    names = _trainable("connector_only", model)
    assert _parts(names, model) == {"connector"}
    assert _whole(names, model, "connector")


@pytest.mark.parametrize("tied", [False, True])
def test_idefics_trains_what_joins_images_and_text_and_the_new_rows(tied):
    model = _model("idefics", tie_word_embeddings=tied)
    names = _trainable("idefics", model)
    assert _parts(names, model) == {"connector", "cross_attention", "new_tokens"}
    assert _whole(names, model, "connector", "cross_attention", "new_tokens")
    assert "model.embed_tokens.weight" not in names
    assert "model.embed_tokens.additional_embedding.weight" in names
    assert ("lm_head.additional_fc.weight" in names) == (not tied)


def test_idefics2_stages():
    first = _trainable("idefics2_stage1", _model("idefics2"))
    model = _model("idefics2")
    second = _trainable("idefics2_stage2", model)
    assert _parts(first, model) == {"connector", "new_tokens"}
    assert _whole(first, model, "connector", "new_tokens")
    assert second - first == {
        f"model.vision_model.embeddings.{name}"
        for name in ("patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight")
    }


def test_smolvlm_trains_norms_of_every_part():
    model = _model("idefics3")
    names = _trainable("smolvlm", model)
    assert _whole(names, model, "connector", "new_tokens")
    rest = {n for n in names if part_of(n, model.parts()) not in ("connector", "new_tokens")}
    norms = {n for n, _ in model.named_parameters() if "norm" in n}
    assert {n for n in rest if ".embeddings." not in n} == norms
    assert {n for n in rest if ".embeddings." in n and "vision_model" in n} == rest - norms


@pytest.mark.parametrize(
    ("preset", "family", "changes", "word"),
    [
        ("idefics", "idefics2", {}, "connector, text, embeddings, lm_head"),
        ("idefics", "idefics", {"additional_vocab_size": 0}, "freeze.new_rows_from"),
        ("idefics2_stage1", "idefics", {}, "additional_vocab_size"),
        ("connector_only", "idefics", {"use_resampler": False}, "'connector'"),
    ],
)
def test_a_preset_of_another_family_is_refused_with_a_sentence(preset, family, changes, word):
    with pytest.raises(ConfigError) as caught:
        _trainable(preset, _model(family, **changes))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
