"""What people ask of a model besides calling it: for all eight classes, as transformers answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import m4train
from m4train.errors import ConfigError
from m4train.models.quantized import BitsAndBytesConfig, is_quantized, quantize_linears
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs

FAMILIES: dict[str, tuple[str, Any, Any]] = {
    "Idefics": ("ForVisionText2Text", tiny_idefics, idefics_inputs),
    "Idefics2": ("ForConditionalGeneration", tiny_idefics2, idefics2_inputs),
    "Idefics3": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
    "SmolVLM": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
}
CLASSES = [(name, end) for name, (head, _, _) in FAMILIES.items() for end in ("Model", head)]


def made(name: str, end: str, **changes: Any) -> Any:
    config = FAMILIES[name][1](**changes) | {"model_type": name.lower()}
    model = getattr(m4train, name + end)(getattr(m4train, f"{name}Config").from_dict(config)).eval()
    perturb(model)
    return model


@pytest.mark.parametrize(("name", "end"), CLASSES)
def test_embeddings_head_and_size(name: str, end: str) -> None:
    model = made(name, end)
    embedding = model.get_input_embeddings()
    assert embedding.weight.shape == (97, 32)
    theirs = getattr(transformers, name + end)(getattr(transformers, f"{name}Config")(**FAMILIES[name][1]()))
    assert model.num_parameters() == theirs.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) < model.num_parameters()
    embedding.weight.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == model.num_parameters() - 97 * 32
    head = model.get_output_embeddings()
    assert (head is None) == (end == "Model")
    fresh = type(embedding)(*((97, 2, 32) if name == "Idefics" else (97, 32)))
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh
    if head is None:
        with pytest.raises(ConfigError, match="has no head to replace"):
            model.set_output_embeddings(fresh)
    else:
        model.set_output_embeddings(torch.nn.Identity())
        assert isinstance(model.get_output_embeddings(), torch.nn.Identity)
    text = model.config.get_text_config()
    assert text.vocab_size == 97
    assert text is (model.config if name == "Idefics" else model.config.text_config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("name", "end"), CLASSES)
def test_token_embeddings_of_another_size(name: str, end: str, tied: bool, tmp_path: Path) -> None:
    model = made(name, end, tie_word_embeddings=tied, **({"additional_vocab_size": 0} if name == "Idefics" else {}))
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings()
    before_head = None if head is None else head.weight.detach().clone()
    assert model.resize_token_embeddings().num_embeddings == 97
    grown = model.resize_token_embeddings(99, pad_to_multiple_of=8)
    assert grown is model.get_input_embeddings()
    assert grown.weight.shape == (104, 32)
    assert torch.equal(grown.weight[:97], before)
    torch.testing.assert_close(grown.weight[97:], before.mean(0).expand(7, 32))
    if head is not None:
        assert torch.equal(head.weight[:97], before_head)
        assert (head.weight is grown.weight) == tied
        assert model(torch.tensor([[5, 103]])).logits.shape == (1, 2, 104)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(torch.tensor([[5, 103]])).logits, model(torch.tensor([[5, 103]])).logits)
    assert model.config.token_rows == 104
    assert model.resize_token_embeddings(50).weight.shape == (50, 32)
    random = model.resize_token_embeddings(60, mean_resizing=False).weight[50:]
    assert random.std() < 0.1
    assert (random[0] != random[1]).any()


@pytest.mark.parametrize("given", [{"pad_to_multiple_of": 1.3}, {"new_num_tokens": 2.5}, {"new_num_tokens": -1}])
def test_rows_are_whole_numbers(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a whole number above 0"):
        made("Idefics3", "ForConditionalGeneration").resize_token_embeddings(**{"new_num_tokens": 99, **given})


def test_features_under_their_later_name_are_not_passed_over() -> None:
    with pytest.raises(TypeError, match="as image_hidden_states"):
        made("Idefics3", "ForConditionalGeneration")(torch.tensor([[5]]), mm_encoder_outputs={"x": 1})


def test_rows_of_their_own_are_not_resized() -> None:
    with pytest.raises(ConfigError, match="keeps its new tokens in a table of 2 rows of their own"):
        made("Idefics", "ForVisionText2Text").resize_token_embeddings(120)


@pytest.mark.parametrize(("name", "end"), CLASSES)
def test_gradient_checkpointing(name: str, end: str) -> None:
    model = made(name, end).train()
    inputs = FAMILIES[name][2](FAMILIES[name][1]())
    calls: list[int] = []
    layers = model._layers()
    layers[-1].register_forward_hook(lambda *_: calls.append(1))
    found = []
    for switch in (
        model.gradient_checkpointing_disable,
        model.gradient_checkpointing_enable,
        model.gradient_checkpointing_disable,
    ):
        switch()
        model.zero_grad()
        out = model(**inputs, use_cache=False)[0]
        out.square().sum().backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert model.is_gradient_checkpointing == (switch == model.gradient_checkpointing_enable)
    for other in found[1:]:
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    assert len(model._checkpointed) == len(layers) > 3


@pytest.mark.parametrize("name", FAMILIES)
def test_image_features_of_model_and_head(name: str) -> None:
    model = made(name, FAMILIES[name][0])
    inputs = FAMILIES[name][2](FAMILIES[name][1]())
    given = [inputs["pixel_values"]] + ([] if name == "Idefics" else [inputs["pixel_attention_mask"]])
    features = model.get_image_features(*given)
    assert torch.equal(features, model.model.get_image_features(*given))
    expected = model(**inputs).image_hidden_states
    torch.testing.assert_close(features.flatten(0, 1)[:10], expected.reshape(-1, expected.shape[-1])[:10])


def folder_of(tmp_path: Path, **changes: Any) -> tuple[Any, Path]:
    model = made("Idefics3", "ForConditionalGeneration", **changes)
    model.save_pretrained(tmp_path)
    return model, tmp_path


LOADS: dict[str, tuple[dict[str, Any], Any]] = {  # what is passed -> what is seen of the model
    "torch_dtype": ({"torch_dtype": torch.float64}, lambda m: m.dtype == torch.float64),
    "dtype": ({"dtype": "bfloat16"}, lambda m: m.dtype == torch.bfloat16),
    "auto": ({"dtype": "auto"}, lambda m: m.dtype == torch.float32),
    "device_map": ({"device_map": "auto"}, lambda m: m.device.type in ("cpu", "cuda")),
    "a device": ({"device_map": "meta"}, lambda m: m.device.type == "meta"),
    "torch.device": ({"device_map": torch.device("cpu")}, lambda m: m.device.type == "cpu"),
    "a mapping": ({"device_map": {"": "cpu"}}, lambda m: m.device.type == "cpu"),
    "parts of one": (
        {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}},
        lambda m: m.device.type == "cpu",
    ),
    "attn_implementation": ({"attn_implementation": "sdpa"}, lambda m: True),
    "token": ({"token": "secret", "revision": "main", "local_files_only": True, "cache_dir": None}, lambda m: True),
    "use_safetensors": ({"use_safetensors": True, "low_cpu_mem_usage": True}, lambda m: True),
    "trust_remote_code": ({"trust_remote_code": True, "force_download": False}, lambda m: True),
    "a field": ({"pad_token_id": 7}, lambda m: m.config.text_config.pad_token_id == 7 or m.config.pad_token_id == 7),
    "use_cache": ({"use_cache": False}, lambda m: m(torch.tensor([[5]])).past_key_values is None),
    "outputs": ({"output_hidden_states": True}, lambda m: m(torch.tensor([[5]])).hidden_states is not None),
}
REFUSED: dict[str, tuple[dict[str, Any], type, str]] = {
    "two devices": (
        {"device_map": {"model": "cpu", "lm_head": "meta"}},
        ConfigError,
        "device_map names cpu, meta, but",
    ),
    "8 bits": ({"load_in_8bit": True}, ConfigError, "does not implement load_in_8bit"),
    "eager": ({"attn_implementation": "eager"}, ConfigError, "attn_implementation is 'eager'"),
    "typo": ({"torch_dtyp": "bfloat16"}, TypeError, "has no argument torch_dtyp"),
}


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("name", LOADS)
def test_what_is_passed_to_from_pretrained_acts(name: str, auto: bool, tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path)
    kind = m4train.AutoModelForImageTextToText if auto else m4train.Idefics3ForConditionalGeneration
    given, seen = LOADS[name]
    assert seen(kind.from_pretrained(folder, **given))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_act_is_one_sentence(name: str, tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path)
    given, error, said = REFUSED[name]
    with pytest.raises(error, match=said) as raised:
        m4train.Idefics3ForConditionalGeneration.from_pretrained(folder, **given)
    assert "\n" not in str(raised.value)


def test_what_was_missing_is_told_if_asked(tmp_path: Path) -> None:
    model, folder = folder_of(tmp_path)
    kind = type(model)
    _, info = kind.from_pretrained(pretrained_model_name_or_path=folder, output_loading_info=True)
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    weights = load_file(folder / "model.safetensors")
    weights["other"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors")
    _, info = kind.from_pretrained(folder, output_loading_info=True, strict=False)
    assert (info["missing_keys"], info["unexpected_keys"]) == ({"lm_head.weight"}, {"other"})
    with torch.device("meta"), pytest.raises(ConfigError, match="called under"):
        kind.from_pretrained(folder)


def test_gradients_through_frozen_embeddings() -> None:
    model = made("Idefics3", "ForConditionalGeneration")
    model.requires_grad_(False)
    ids = torch.tensor([[5, 6]])
    assert not model(ids).logits.requires_grad
    model.enable_input_require_grads()
    assert model(ids).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(ids).logits.requires_grad


def test_how_to_generate_is_set_as_attributes_or_as_a_whole() -> None:
    model, ids = made("Idefics3", "ForConditionalGeneration"), torch.tensor([[5, 6]])
    assert model.generation_config.num_beams == 1
    model.generation_config.max_new_tokens = 3
    assert model.generate(ids).shape == (1, 5)
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2, eos_token_id=None)
    assert model.generation_config.max_new_tokens == 2
    assert model.generate(ids).shape == (1, 4)
    model.generation_config = {"max_new_tokens": 4}
    assert model.generation_config == {"max_new_tokens": 4} == model.generation_config.to_dict()
    assert not hasattr(model.generation_config, "no_such_setting")


@pytest.mark.parametrize(("name", "end"), CLASSES)
def test_what_is_asked_of_any_model(name: str, end: str) -> None:
    model = made(name, end)
    theirs = getattr(transformers, f"{name}{end}")
    assert model.can_generate() == theirs.can_generate() == (end != "Model")
    assert (model.main_input_name, model.base_model_prefix) == (theirs.main_input_name, theirs.base_model_prefix)
    assert model.vocab_size == model.config.get_text_config().vocab_size == 97
    assert set(model.config.to_diff_dict()) < set(model.config.to_dict())
    assert type(model.config).from_dict(model.config.to_diff_dict()).to_dict() == model.config.to_dict()
    assert model.base_model is (model if end == "Model" else model.model)
    assert model.get_memory_footprint(return_buffers=False) == 4 * model.num_parameters()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="attn_implementation is 'eager'"):
        model.set_attn_implementation("eager")


def test_a_configuration_instead_of_the_folders(tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path)
    config = m4train.Idefics3Config.from_pretrained(folder)
    config.text_config.rope_theta = 10.0
    kind = m4train.Idefics3ForConditionalGeneration
    theirs = transformers.Idefics3Config(**config.to_dict())
    for given in (config, config.to_dict(), theirs):
        assert kind.from_pretrained(folder, config=given).config.text_config.rope_theta == 10.0
    assert kind.from_pretrained(folder, config=folder).config.text_config.rope_theta == 10000.0


def test_what_is_passed_to_save_pretrained(tmp_path: Path) -> None:
    model, _ = folder_of(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB", push_to_hub=False, safe_serialization=True)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    model.save_pretrained(save_directory=tmp_path / "bytes", max_shard_size=20_000, token=None, state_dict=None)
    assert len(list((tmp_path / "bytes").glob("*.safetensors"))) > 3
    for given, error in (
        ({"push_to_hub": True}, ConfigError),
        ({"safe_serialization": False}, ConfigError),
        ({"max_shard_size": "much"}, ConfigError),
        ({"max_shard": 3}, TypeError),
    ):
        with pytest.raises(error):
            model.save_pretrained(tmp_path / "refused", **given)


def test_a_stored_head_that_differs_from_the_embeddings_it_is_tied_to(tmp_path: Path) -> None:
    model, folder = folder_of(tmp_path)
    text = (folder / "config.json").read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    (folder / "config.json").write_text(text)
    with pytest.warns(UserWarning, match=r"lm_head.weight differs from model.text_model.embed_tokens.weight"):
        again = type(model).from_pretrained(folder)
    ids = torch.tensor([[5, 6]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not again.config.tie_word_embeddings


def test_modules_that_are_not_stored_in_4_bits() -> None:
    pytest.importorskip("bitsandbytes")
    for skipped, expected in ((["vision_model"], "vision_model"), (["q_proj", "model.connector"], "q_proj")):
        model = made("Idefics3", "ForConditionalGeneration")
        quantize_linears(model, BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped))
        stored = {
            name: is_quantized(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        assert any(stored.values())
        assert not any(stored[name] for name in stored if f".{expected}." in f".{name}.")
    with pytest.raises(ConfigError, match="llm_int8_skip_modules names tower"):
        quantize_linears(model, BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["tower"]))
