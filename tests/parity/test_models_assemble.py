"""Models assembled of backbones compute what the backbones compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from m4train.errors import CheckpointError, ConfigError
from m4train.models import (
    Idefics2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    IdeficsForVisionText2Text,
)
from m4train.models.assemble import _stretched, assemble
from tests.helpers.models import perturb
from tests.helpers.rounding import assert_near, own_error
from tests.parity.models_reference import rounding, transformers

TEXT = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}


def backbone(kind: str, folder: Path, **changes: Any) -> Any:
    """A perturbed transformers model, saved."""
    if kind in ("Siglip", "CLIP"):
        config = getattr(transformers, f"{kind}VisionConfig")(**{**VISION, **changes})
        model = getattr(transformers, f"{kind}VisionModel")(config)
    else:
        config = getattr(transformers, f"{kind}Config")(**{**TEXT, **changes})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    perturb(model)
    model.eval().save_pretrained(folder)
    return model


FAMILIES = {
    "idefics": (IdeficsForVisionText2Text, "CLIP", "Llama"),
    "idefics2": (Idefics2ForConditionalGeneration, "Siglip", "Mistral"),
    "idefics3": (Idefics3ForConditionalGeneration, "Siglip", "Llama"),
}
NEW = {
    "idefics": {"alpha_initializer": "zeros", "freeze_text_layers": False},
    "idefics2": {"perceiver_config": {"resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1}},
    "idefics3": {},
}


def build(family: str, folder: Path, text: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any, Any]:
    kind, vision_kind, text_kind = FAMILIES[family]
    vision = backbone(vision_kind, folder / "vision")
    heads = {} if family == "idefics" else {"num_key_value_heads": 2}
    decoder = backbone(text_kind, folder / "text", **{**heads, **(text or {})})
    model = assemble(kind, folder / "vision", folder / "text", **{**NEW[family], **options})
    return model.eval(), vision, decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backbones_keep_their_function(family: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model, vision, decoder = build(family, tmp_path, added_tokens=3, generator=generator)
    ids = torch.randint(0, 83, (2, 9), generator=torch.Generator().manual_seed(1))
    # With its gates closed Idefics is its text model, too.
    assert_near(model(ids).logits[..., :83], decoder(ids).logits, rounding(decoder, {"input_ids": ids}))
    assert model(ids + 3).logits.shape == (2, 9, 86)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    seen: list[torch.Tensor] = []
    model.model.vision_model.register_forward_hook(lambda _, __, out: seen.append(out))
    if family == "idefics":
        model.model.image_features(pixels)
        expected = vision(pixels).last_hidden_state
    else:
        model.model.get_image_features(pixels[:, None])
        expected = vision(pixels).last_hidden_state
    error = own_error(lambda tower, given: tower(given).last_hidden_state, vision, pixels)
    assert_near(seen[0], expected.flatten(0, 1), error)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows(family: str, tmp_path: Path) -> None:
    model, _, _ = build(family, tmp_path, added_tokens=5000, generator=torch.Generator().manual_seed(0))
    embedding, head = (
        (model.model.embed_tokens.additional_embedding.weight, model.lm_head.additional_fc.weight)
        if family == "idefics"
        else (model.model.text_model.embed_tokens.weight[83:], model.lm_head.weight[83:])
    )
    for rows in (embedding, head):
        assert rows.shape == (5000, 32)
        assert abs(rows.std() * 32**0.5 - 1) < 0.02


def test_a_tied_text_model(tmp_path: Path) -> None:
    model, _, decoder = build("idefics3", tmp_path / "tied", {"tie_word_embeddings": True}, added_tokens=3)
    ids = torch.randint(0, 83, (1, 7))
    assert model.lm_head.weight is model.model.text_model.embed_tokens.weight
    assert_near(model(ids).logits[..., :83], decoder(ids).logits, rounding(decoder, {"input_ids": ids}))
    model, _, decoder = build("idefics3", tmp_path / "untied", {"tie_word_embeddings": True}, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.text_model.embed_tokens.weight
    assert_near(model(ids).logits, decoder(ids).logits, rounding(decoder, {"input_ids": ids}))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_size(family: str, tmp_path: Path) -> None:
    model, vision, _ = build(family, tmp_path, vision_config={"image_size": 24})
    expected = vision(torch.zeros(1, 3, 16, 16)).last_hidden_state
    assert model.config.vision_config.grid == 6
    old = dict(vision.named_parameters())
    positions = next(p for name, p in old.items() if name.endswith("position_embedding.weight"))
    new = model.model.vision_model.embeddings.position_embedding.weight
    first = 1 if family == "idefics" else 0
    assert new.shape[0] == 36 + first
    square = positions[first:].unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    stretch = partial(torch.nn.functional.interpolate, size=(6, 6), mode="bicubic")
    assert_near(new[first:], stretch(square).flatten(2)[0].t(), own_error(stretch, square))
    assert torch.equal(new[:first], positions[:first])
    assert expected.shape[1] == 16 + first


def test_every_grid_can_become_every_other() -> None:
    for old in (1, 7, 14, 27):
        for new in range(1, 80):
            for first in (False, True):
                stretched = _stretched(torch.rand(old * old + first, 1), new, first)
                assert stretched.shape == (new * new + first, 1), (old, new)


def test_what_cannot_be_assembled(tmp_path: Path) -> None:
    backbone("CLIP", tmp_path / "clip")
    backbone("Siglip", tmp_path / "siglip")
    backbone("Llama", tmp_path / "llama", num_key_value_heads=2)
    with pytest.raises(ConfigError, match="holds a 'clip_vision_model', but Idefics3ForConditionalGeneration has"):
        assemble(Idefics3ForConditionalGeneration, tmp_path / "clip", tmp_path / "llama")
    with pytest.raises(ConfigError, match="has 2 key heads for 4 heads, but Idefics"):
        assemble(IdeficsForVisionText2Text, tmp_path / "clip", tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"the shape \(24, 3, 4, 4\), but the model has \(24, 3, 8, 8\)"):
        assemble(
            Idefics3ForConditionalGeneration,
            tmp_path / "siglip",
            tmp_path / "llama",
            vision_config={"patch_size": 8},
        )
    with pytest.raises(ConfigError, match=r"there is no config.json"):
        assemble(Idefics3ForConditionalGeneration, tmp_path / "siglip", tmp_path)
