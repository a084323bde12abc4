"""config.json of both vintages."""

from __future__ import annotations

import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch

from m4train.errors import ConfigError
from m4train.models import Idefics3Config, Idefics3ForConditionalGeneration, IdeficsConfig, IdeficsModel, SmolVLMConfig
from m4train.models.outputs import CausalLMOutput
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics3

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_both_vintages_mean_the_same() -> None:
    old = tiny_idefics3(torch_dtype="bfloat16", text_config={"rope_theta": 5e5, "rope_scaling": {**LLAMA3}})
    new = tiny_idefics3(dtype="bfloat16", text_config={"rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    del new["text_config"]["rope_theta"]
    new["_pad_token_id"] = new.pop("pad_token_id")
    first, second = Idefics3Config.from_dict(old), Idefics3Config.from_dict(new)
    assert first == second
    assert first.pad_token_id == 0
    assert first.text_config.rope_theta == 5e5
    assert first.text_config.rope_scaling == LLAMA3


def test_default_rope_parameters_mean_no_scaling() -> None:
    values = tiny_idefics3(text_config={"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}})
    text = Idefics3Config.from_dict(values).text_config
    assert (text.rope_theta, text.rope_scaling) == (123.0, None)


def test_round_trip_keeps_unused_keys(tmp_path: Path) -> None:
    config = Idefics3Config.from_dict(tiny_idefics3(architectures=["X"], text_config={"max_length": 3}))
    config.save_pretrained(tmp_path)
    assert Idefics3Config.from_pretrained(tmp_path) == config
    assert config.to_dict()["architectures"] == ["X"]
    assert config.to_dict()["text_config"]["max_length"] == 3


def test_unknown_keys_are_warned_about_and_generic_ones_are_not() -> None:
    with pytest.warns(UserWarning, match="Idefics3Config keeps but does not use the keys other, scale_facter"):
        Idefics3Config.from_dict(tiny_idefics3(scale_facter=4, other=1, architectures=[], output_attentions=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Idefics3Config.from_dict(tiny_idefics3(transformers_version="4.46.3", return_dict=True))


def test_class_defaults_are_the_documented_ones() -> None:
    config = Idefics3Config()
    assert (config.image_token_id, config.scale_factor, config.pad_token_id) == (128257, 2, 128002)
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (1152, 224)
    assert config.text_config.rms_norm_eps == 1e-5


def test_impossible_values() -> None:
    with pytest.raises(ConfigError, match=r"attention_bias is True, but only False is implemented"):
        Idefics3Config.from_dict(tiny_idefics3(text_config={"attention_bias": True}))
    with pytest.raises(ConfigError, match="num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        Idefics3Config.from_dict(tiny_idefics3(text_config={"num_key_value_heads": 3}))


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type 'llama', but Idefics3Config reads 'idefics3'"):
        Idefics3Config.from_pretrained(tmp_path)


def test_smolvlm_reads_what_was_published_as_idefics3(tmp_path: Path) -> None:
    Idefics3Config.from_dict(tiny_idefics3()).save_pretrained(tmp_path)
    assert SmolVLMConfig.from_pretrained(tmp_path).to_dict()["model_type"] == "smolvlm"


def test_further_arguments_of_the_constructor(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = Idefics3Config(architectures=["x"], torch_dtype="bfloat16", output_hidden_states=True)
    assert (config.architectures, config.dtype, config.output_hidden_states) == (["x"], "bfloat16", True)
    config.save_pretrained(tmp_path)
    assert Idefics3Config.from_pretrained(tmp_path) == config
    with pytest.warns(UserWarning, match="Idefics3Config keeps but does not use the keys scale_facter"):
        Idefics3Config(scale_facter=4)
    with pytest.raises(AttributeError, match="Idefics3Config has no field nothing"):
        _ = config.nothing


def test_outputs_a_configuration_asks_for() -> None:
    ids = torch.tensor([[5, 6, 7]])
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3(return_dict=False))).eval()
    assert isinstance(model(ids), tuple)
    assert isinstance(model.model(ids), tuple)
    assert isinstance(model(ids, return_dict=True), CausalLMOutput)
    assert model.generate(ids, max_new_tokens=2).shape == (1, 5)
    values = tiny_idefics3(output_hidden_states=True, output_attentions=True)
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(values)).eval()
    output = model(ids)
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    output = model(ids, output_hidden_states=False, output_attentions=False)
    assert output.hidden_states is None
    assert output.attentions is None
    assert model.generate(ids, max_new_tokens=2, eos_token_id=[]).shape == (1, 5)


def test_an_activation_given_as_a_function(tmp_path: Path) -> None:
    named = IdeficsModel(IdeficsConfig.from_dict(tiny_idefics(hidden_act="gelu")))
    given = IdeficsModel(IdeficsConfig.from_dict(tiny_idefics(hidden_act=torch.nn.functional.gelu)))
    for model in (named, given):
        perturb(model)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(named(ids)[0], given(ids)[0])
    with pytest.raises(ConfigError, match=r"holds <.*gelu.*>, which config.json cannot: .* hidden_act by its name$"):
        given.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_configuration_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=r"cache holds no config.json of the hub model owner/name at revision v1"):
        Idefics3Config.from_pretrained("owner/name", revision="v1", cache_dir=tmp_path)
    Idefics3Config.from_dict(tiny_idefics3()).save_pretrained(tmp_path)
    config = Idefics3Config.from_pretrained("owner/name", revision="v1", cache_dir=tmp_path)
    assert config == Idefics3Config.from_dict(tiny_idefics3())
    assert asked == {"name": "owner/name", "revision": "v1", "cache_dir": tmp_path, "allow_patterns": ["config.json"]}
