"""Loading with the class a folder names, and hub ids without a network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

import m4train.models
from m4train.errors import ConfigError
from m4train.models import AutoModelForImageTextToText, Idefics3ForConditionalGeneration
from tests.unit.models.test_packing import FAMILIES, make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_is_that_of_the_folder(family: str, tmp_path: Path) -> None:
    model, _, _ = make(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, torch_dtype="float32", device_map="cpu")
    assert type(loaded) is type(model)
    assert str(loaded.dtype) == "torch.float32"


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ConfigError, match="model_type 'llava', but m4train knows idefics, idefics2, idefics3, smolvlm"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_what_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no folder \./elsewhere"):
        Idefics3ForConditionalGeneration.from_pretrained("./elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="hub model owner/model is neither cached nor within reach"):
        Idefics3ForConditionalGeneration.from_pretrained("owner/model", cache_dir=tmp_path)


def test_pickle_files_are_fetched_only_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def download(*_: object, allow_patterns: list[str], **__: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for kind in (AutoModelForImageTextToText, Idefics3ForConditionalGeneration):
        for allowed in (False, True):
            with pytest.raises(ConfigError, match=r"no config.json"):
                kind.from_pretrained("owner/model", allow_pickle=allowed)
            assert ("pytorch_model*.bin" in asked[-1]) == allowed


def test_every_public_name_can_be_loaded() -> None:
    assert all(getattr(m4train.models, name).__name__ == name for name in m4train.models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Idefics9'"):
        _ = m4train.models.Idefics9
