"""What the configuration says next to model.pretrained acts, or is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from m4train import build
from m4train.config import ModelConfig
from m4train.config.compose import load_config, save_config, stored_config
from m4train.config.start import forget_scratch
from m4train.errors import ConfigError
from m4train.families import FAMILIES
from m4train.training.checkpoints.changes import differences
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.helpers.processing import (
    tiny_idefics2_processor,
    tiny_idefics3_processor,
    tiny_idefics_processor,
    tokenizer_folder,
)

MAKERS = {
    "idefics": (tiny_idefics_processor, tiny_idefics),
    "idefics2": (tiny_idefics2_processor, tiny_idefics2),
    "idefics3": (tiny_idefics3_processor, tiny_idefics3),
}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of each family, without weights."""
    make, tiny = MAKERS[request.param]
    folder = tmp_path_factory.mktemp("folders") / request.param
    make(folder)
    FAMILIES[request.param].load("Config").from_dict(tiny()).save_pretrained(folder)
    return folder


def configured(folder: Path, *overrides: str) -> Any:
    start = [f"model.family={folder.name}", f"model.pretrained={folder}"]
    return load_config(["experiment=digits_sft", *start, *overrides])


@cache
def loaded(folder: Path) -> Any:
    """The processor of a folder as it is."""
    return build.build_processor(configured(folder))


# setting of the processor -> a value that differs, and how it is read off the processor that was built
SETTINGS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "image_mean": ([0.1, 0.2, 0.3], lambda p: list(p.image_processor.image_mean)),
    "image_std": ([0.4, 0.5, 0.6], lambda p: list(p.image_processor.image_std)),
    "resample": (0, lambda p: p.image_processor.resample),
    "rescale_factor": (0.5, lambda p: p.image_processor.rescale_factor),
    "do_normalize": (False, lambda p: p.image_processor.do_normalize),
    "do_rescale": (False, lambda p: p.image_processor.do_rescale),
    "padding_side": ("right", lambda p: p.tokenizer.padding_side),
    "truncation_side": ("left", lambda p: p.tokenizer.truncation_side),
    "model_max_length": (77, lambda p: p.tokenizer.model_max_length),
    "chat_template": ("plain", lambda p: p.chat_template),
    "pad_token": ("<image>", lambda p: p.tokenizer.pad_token),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_processor_changes_the_loaded_one(folder: Path, name: str) -> None:
    value, read = SETTINGS[name]
    before = loaded(folder)
    after = build.build_processor(configured(folder, f"model.processor.{name}={json.dumps(value)}"))
    assert read(after) == value != read(before)
    assert [other for other, (_, read) in SETTINGS.items() if read(after) != read(before)] == [name]


def test_a_setting_that_there_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no setting 'image_men': did you mean 'image_mean'\?"):
        build.build_processor(configured(folder, "model.processor.image_men=[1, 1, 1]"))


def test_a_setting_that_the_model_does_not_follow_is_refused(folder: Path) -> None:
    name = "image_size" if folder.name == "idefics" else "image_seq_len"
    with pytest.raises(ConfigError, match=f"model.processor.{name} is 99, but the model takes"):
        build.build_processor(configured(folder, f"model.processor.{name}=99"))


def test_the_architecture_of_a_folder_is_its_own(folder: Path) -> None:
    assert configured(folder).model.architecture == {}
    with pytest.raises(
        ConfigError, match=r"model.architecture is .*, but model.pretrained is .*leave model.architecture out"
    ):
        configured(folder, "model.architecture.dropout=0.1")


def test_another_tokenizer_takes_the_place_of_the_folders(folder: Path) -> None:
    smaller = tokenizer_folder(400)
    before, after = (build.build_processor(configured(folder, *more)) for more in ([], [f"model.tokenizer={smaller}"]))
    assert len(after.tokenizer) < len(before.tokenizer)
    assert after.chat_template == before.chat_template


def test_a_tokenizer_that_places_images_elsewhere_is_refused(tmp_path: Path) -> None:
    from tests.helpers.checkpoints import saved_run

    config, _ = saved_run(tmp_path / "run")
    start = ["experiment=digits_sft", f"model.pretrained={tmp_path / 'run'}"]
    build.build_model(config := load_config(start), build.build_processor(config))
    smaller = load_config([*start, f"model.tokenizer={tokenizer_folder(400)}"])
    with pytest.raises(ConfigError, match=r"gives <image> the id \d+, but the model's config.json \d+"):
        build.build_model(smaller, build.build_processor(smaller))


def test_a_choice_made_from_scratch_gives_way_to_the_folder_and_an_experiment_does_not(folder: Path) -> None:
    config = configured(folder)
    assert (config.model.architecture, config.model.processor, config.model.tokenizer) == ({}, {}, None)
    assert config.adapter.kind == "lora"  # all else of the experiment stays
    scratch = load_config(["experiment=digits_sft"])
    assert scratch.model.architecture
    assert scratch.model.tokenizer
    kept = load_config(["experiment=digits_sft", "model.pretrained=null"]).model
    assert kept == scratch.model


def test_a_stored_run_of_an_earlier_version_stays_the_same_run(tmp_path: Path) -> None:
    """They kept the architecture of a choice, which nobody read, next to model.pretrained."""
    now = load_config(["experiment=digits_sft", f"model.pretrained={tmp_path}"])
    then = load_config(["experiment=digits_sft"])
    then.model.pretrained = str(tmp_path)
    save_config(then, tmp_path / "config.yaml")
    assert stored_config(dataclasses.asdict(then), tmp_path).model == now.model
    assert not differences(dataclasses.asdict(then), now)
    own = ModelConfig(pretrained="x", processor={"resample": 0})
    forget_scratch(own)
    assert own.processor == {"resample": 0}  # what was said next to it, by this version


@pytest.mark.parametrize("model", ["tiny_idefics", "tiny_idefics2", "tiny_idefics3"])
def test_packs_longer_than_the_model_was_trained_for_are_said(model: str, recwarn: pytest.WarningsRecorder) -> None:
    def built(length: int) -> None:
        start = ["experiment=digits_pretrain", f"model={model}", f"model.tokenizer={tokenizer_folder()}"]
        config = load_config([*start, f"data.sequence_length={length}"])
        build.build_model(config, build.build_processor(config))

    built(2048)
    assert not [w for w in recwarn if "max_position_embeddings" in str(w.message)]
    with pytest.warns(UserWarning, match="data.sequence_length is 4000, but max_position_embeddings of the model 2048"):
        built(4000)
