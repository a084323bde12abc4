"""Configuration to objects: every family from scratch, and the published ones by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from m4train import build
from m4train.config import Config
from m4train.config.compose import groups, load_config
from m4train.data.documents.image_layout import CrossFrames, Frames, Patches
from m4train.errors import ConfigError
from m4train.processing.tokenizer_training import train_bpe_tokenizer

LAYOUTS = {"tiny_idefics": CrossFrames, "tiny_idefics2": Patches, "tiny_idefics3": Frames}
PUBLISHED = {
    "idefics_9b": "HuggingFaceM4/idefics-9b",
    "idefics_80b": "HuggingFaceM4/idefics-80b",
    "idefics2_8b": "HuggingFaceM4/idefics2-8b",
    "idefics3_8b": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm_256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm_500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm_2b": "HuggingFaceTB/SmolVLM-Instruct",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe_tokenizer(["This is a seven.", "A three."], 320, folder)
    return folder


def configured(model: str, tokenizer: Path) -> Config:
    return load_config(["experiment=digits_pretrain", f"model={model}", f"model.tokenizer={tokenizer}"])


def test_every_family_and_every_choice_is_there() -> None:
    assert tuple(build.FAMILIES) == ("idefics", "idefics2", "idefics3", "smolvlm")
    assert set(groups()["model"]) == {*LAYOUTS, *PUBLISHED, "backbones"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_from_scratch_fits_its_processor(name: str, tokenizer: Path) -> None:
    config = configured(name, tokenizer)
    processor = build.build_processor(config)
    model: Any = build.build_model(config, processor)
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 2_100_000
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.token_rows == len(processor.tokenizer)
    assert model.generation_config["eos_token_id"] == [processor.eos_id, processor.end_of_utterance_id]
    layout = build.build_layout(config, processor)
    assert type(layout) is LAYOUTS[name]
    features = 0 if name == "tiny_idefics" else model.config.tokens_per_image
    ids = processor.image_ids(32, 32)
    assert int((ids == processor.image_token_id).sum()) == (features or 1)
    again: Any = build.build_model(config, processor)
    assert all(p.equal(q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_last_entries_of_the_tokenizer_are_the_additional_vocabulary(tokenizer: Path) -> None:
    config = configured("tiny_idefics", tokenizer)
    processor = build.build_processor(config)
    architecture = build.build_architecture(config, processor)
    assert architecture.additional_vocab_size == 40
    assert processor.pad_id < architecture.vocab_size <= processor.image_token_id
    assert processor.image_size == architecture.vision_config.image_size == 32


def test_patches_are_placed_as_the_model_places_them(tokenizer: Path) -> None:
    config = configured("tiny_idefics2", tokenizer)
    processor = build.build_processor(config)
    model: Any = build.build_model(config, processor)
    layout = build.build_layout(config, processor)
    vision = model.config.vision_config
    expected = {"size": vision.patch_size, "side": vision.grid, "rounding": model.model.position_rounding}
    assert asdict(layout) == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tokenizer_larger_than_the_embedding_is_refused(name: str, tokenizer: Path) -> None:
    config = configured(name, tokenizer)
    processor = build.build_processor(config)
    small = {"vocab_size": 310 - config.model.architecture.get("additional_vocab_size", 0)}
    if name == "tiny_idefics":
        config.model.architecture |= small
    else:
        config.model.architecture["text_config"] |= small
    with pytest.raises(ConfigError, match=r"The tokenizer has \d+ entries but the model 310 embeddings"):
        build.build_model(config, processor)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_out_of_reach_is_one_sentence(
    name: str, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = configured(name, tokenizer)
    assert config.model.pretrained == PUBLISHED[name]
    with pytest.raises(ConfigError, match=f"hub model {PUBLISHED[name]} is neither cached nor within reach") as refusal:
        build.build_processor(config)
    assert "\n" not in str(refusal.value)
