"""Model folders: whole or sharded, refused where they do not fit, never read through pickle."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from m4train.errors import CheckpointError, ConfigError
from m4train.models import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)
from m4train.models.pretrained import save_folder
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3


@pytest.fixture
def model() -> Idefics3ForConditionalGeneration:
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3()))
    perturb(model)
    return model


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = dict(first.named_parameters()), dict(second.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
def test_round_trip(model: Idefics3ForConditionalGeneration, limit: int, tmp_path: Path) -> None:
    model.generation_config = {"eos_token_id": [2, 96]}
    model.save_pretrained(tmp_path, max_shard_bytes=limit)
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit == 20_000)
    loaded = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    assert same(model, loaded)
    assert loaded.generation_config == {"eos_token_id": [2, 96]}
    assert not loaded.training
    assert loaded.config.extra["architectures"] == ["Idefics3ForConditionalGeneration"]


def test_saving_over_the_folder_it_is_mapped_from(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert same(model, loaded)
    assert same(model, Idefics3ForConditionalGeneration.from_pretrained(tmp_path))


@pytest.mark.parametrize("limits", [(20_000, 5_000_000_000), (5_000_000_000, 20_000), (20_000, 60_000)])
def test_saving_over_another_model_leaves_nothing_of_it(
    model: Idefics3ForConditionalGeneration, limits: tuple[int, int], tmp_path: Path
) -> None:
    model.generation_config = {"eos_token_id": [5]}
    model.save_pretrained(tmp_path, max_shard_bytes=limits[0])
    (tmp_path / "other.safetensors").write_bytes(b"")
    perturb(model, seed=1)
    model.generation_config = {}
    model.save_pretrained(tmp_path, max_shard_bytes=limits[1])
    model.save_pretrained(tmp_path / "fresh", max_shard_bytes=limits[1])
    files = {path.name for path in tmp_path.iterdir()} - {"fresh", "other.safetensors"}
    assert files == {path.name for path in (tmp_path / "fresh").iterdir()}
    loaded = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    assert same(model, loaded)
    assert loaded.generation_config == {}
    assert (tmp_path / "other.safetensors").exists()  # not a name that is ever written: not ours to remove


def test_dtype(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    model.bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    load = Idefics3ForConditionalGeneration.from_pretrained
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").dtype == torch.float32
    assert load(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3(tie_word_embeddings=True)))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.text_model.embed_tokens.weight


def test_the_model_without_head_loads_from_the_same_folder(
    model: Idefics3ForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "whole")
    loaded = Idefics3Model.from_pretrained(tmp_path / "whole")
    assert same(model.model, loaded)
    loaded.save_pretrained(tmp_path / "bare")
    assert same(loaded, Idefics3Model.from_pretrained(tmp_path / "bare"))


def test_missing_and_extra_tensors_are_listed(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.text_model.norm.weight"]
    tensors["model.surprise"] = torch.ones(2)
    tensors["model.text_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    load = Idefics3ForConditionalGeneration.from_pretrained
    with pytest.raises(CheckpointError, match=r"lacks model.text_model.norm.weight and also holds model.surprise:"):
        load(tmp_path)
    loaded = load(tmp_path, strict=False)
    assert bool((loaded.model.text_model.norm.weight == 1).all())
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


FAMILIES = {
    "idefics": (IdeficsForVisionText2Text, IdeficsConfig, tiny_idefics),
    "idefics2": (Idefics2ForConditionalGeneration, Idefics2Config, tiny_idefics2),
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config, tiny_idefics3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_missing_starts_as_in_a_new_model(family: str, tmp_path: Path) -> None:
    kind, config, tiny = FAMILIES[family]
    model = kind(config.from_dict(tiny()))
    model.bfloat16().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    first = next(name for name, _ in model.named_parameters())
    save_file({name: t for name, t in tensors.items() if name != first}, tmp_path / "model.safetensors")
    loaded = kind.from_pretrained(tmp_path, strict=False)
    assert {(p.device.type, p.dtype) for p in loaded.parameters()} == {("cpu", torch.bfloat16)}
    # All but one missing: uninitialised memory would not have the spread of a new model's.
    save_file({first: tensors[first]}, tmp_path / "model.safetensors")
    loaded = kind.from_pretrained(tmp_path, strict=False, dtype="float32")
    for name, parameter in loaded.named_parameters():
        expected = model.get_parameter(name).float()
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad == model.get_parameter(name).requires_grad, name
        if expected.numel() < 24 or expected.std() == 0:
            assert torch.equal(parameter, expected), name
        else:
            assert 0.6 < parameter.std() / expected.std() < 1.7, name


def test_filling_in_makes_no_second_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 16000}
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3(text_config=large)))
    tensors = model.hub_tensors({name: p.detach() for name, p in model.named_parameters()})
    del tensors["model.text_model.norm.weight"]
    save_folder(tmp_path, model.config, tensors)
    del model, tensors
    drawn: list[int] = []
    real = torch.Tensor.normal_
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda t, *a, **k: drawn.append(0 if t.is_meta else t.numel()) or real(t, *a, **k)
    )
    before = psutil.Process().memory_info().rss
    Idefics3ForConditionalGeneration.from_pretrained(tmp_path, strict=False)
    assert psutil.Process().memory_info().rss - before < 0.3 * (tmp_path / "model.safetensors").stat().st_size
    assert sum(drawn) == 0


def test_another_shape_is_refused(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    Idefics3Config.from_dict(tiny_idefics3(text_config={"vocab_size": 99})).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has shape \(97, 32\), but the model needs \(99, 32\)"):
        Idefics3ForConditionalGeneration.from_pretrained(tmp_path)


def test_unusable_folders(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    load = Idefics3ForConditionalGeneration.from_pretrained
    with pytest.raises(ConfigError, match=r"There is no folder .*elsewhere"):
        load(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"no config.json in"):
        load(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        load(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickle files \(pytorch_model.bin\)"):
        load(tmp_path)
    assert same(model, load(tmp_path, allow_pickle=True))
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*which are missing"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0cut off")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


class Surprise:
    """What a pickle file may hold: it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_pickle_files_that_are_asked_for_run_nothing(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    names = list(model.state_dict())
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, members in shards.items():
        torch.save({name: model.state_dict()[name] for name in members}, tmp_path / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    load = Idefics3ForConditionalGeneration.from_pretrained
    with pytest.raises(CheckpointError, match=r"can run any code when read: convert them .*allow_pickle=True"):
        load(tmp_path)
    assert same(model, load(tmp_path, allow_pickle=True))
    torch.save({"lm_head.weight": Surprise(tmp_path / "ran")}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_named_attention(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    load = Idefics3ForConditionalGeneration.from_pretrained
    load(tmp_path, attn_implementation="sdpa")
    load(tmp_path, torch_dtype=torch.float16, attn_implementation="flash_attention_2")
    with pytest.raises(ConfigError, match=r"takes half precision, but the model is torch.float32"):
        load(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(
        ConfigError, match="attn_implementation is 'eager', but only sdpa and flash_attention_2 are implemented"
    ):
        load(tmp_path, attn_implementation="eager")


@pytest.mark.parametrize("width", [512, pytest.param(2048, marks=[pytest.mark.slow, pytest.mark.full])])
def test_loading_maps_the_file_and_training_does_not_write_to_it(width: int, tmp_path: Path) -> None:
    large = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 16000 * width // 512}
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3(text_config=large)))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 80e6
    before = psutil.Process().memory_info().rss
    loaded = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    assert psutil.Process().memory_info().rss - before < 0.3 * size
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert same(model, Idefics3ForConditionalGeneration.from_pretrained(tmp_path))
