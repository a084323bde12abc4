"""Idefics3 and SmolVLM against transformers, all weights perturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m4train.models import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration
from tests.helpers.models import tiny_idefics3
from tests.helpers.rounding import apart, assert_near, widened
from tests.parity.models_inputs import idefics3_inputs, labels_for
from tests.parity.models_reference import (
    assert_half_precision,
    assert_same_gradients,
    exact_gradients,
    gradients,
    reference_pair,
    rounding,
    transformers,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, dict[str, Any]] = {
    "shuffle2": {},
    "shuffle3": {"scale_factor": 3, "vision_config": {"image_size": 26}},
    "shuffle4": {"scale_factor": 4, "vision_config": {"image_size": 32}},
    "llama3_rope": {"text_config": {"rope_theta": 500.0, "rope_scaling": LLAMA3}},
    "linear_rope": {"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}},
    "other_activations": {"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "quick_gelu"}},
    "tied": {"tie_word_embeddings": True},
    "odd_heads": {"text_config": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}},
    "head_dim": {"text_config": {"head_dim": 16}},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_loss_and_gradients(name: str, side: str, tmp_path: Path) -> None:
    config = tiny_idefics3(**CASES[name])
    theirs, ours = reference_pair("Idefics3", config, Idefics3ForConditionalGeneration, tmp_path)
    inputs = idefics3_inputs(config, side)
    labels = labels_for(inputs)
    expected = theirs(**inputs, labels=labels, output_hidden_states=True)
    actual = ours(**inputs, labels=labels, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    error = rounding(theirs, inputs)
    assert_near(actual.logits[real], expected.logits[real], error)
    assert_near(actual.loss, expected.loss, error)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    assert_near(actual.hidden_states[1][real], expected.hidden_states[1][real], error)
    exact = exact_gradients(theirs, lambda model, given: model(**given, labels=labels).loss, inputs)
    assert_same_gradients(gradients(ours, actual.loss), gradients(theirs, expected.loss), exact)


def test_smolvlm(tmp_path: Path) -> None:
    config = tiny_idefics3(model_type="smolvlm")
    config["vision_config"]["model_type"] = "smolvlm_vision"
    theirs, ours = reference_pair("SmolVLM", config, SmolVLMForConditionalGeneration, tmp_path)
    inputs = idefics3_inputs(config)
    real = inputs["attention_mask"].bool()
    assert_near(ours(**inputs).logits[real], theirs(**inputs).logits[real], rounding(theirs, inputs))


def test_smolvlm_with_nothing_but_padding_images(tmp_path: Path) -> None:
    config = tiny_idefics3(model_type="smolvlm")
    config["vision_config"]["model_type"] = "smolvlm_vision"
    theirs, ours = reference_pair("SmolVLM", config, SmolVLMForConditionalGeneration, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    pixels = torch.zeros(1, 2, 3, 16, 16)
    calls = []
    ours.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    error = rounding(theirs, {"input_ids": ids})
    assert_near(ours(ids, pixel_values=pixels).logits, theirs(input_ids=ids).logits, error)
    assert calls == [1]


def test_one_optimizer_step(tmp_path: Path) -> None:
    config = tiny_idefics3()
    theirs, ours = reference_pair("Idefics3", config, Idefics3ForConditionalGeneration, tmp_path)
    inputs = idefics3_inputs(config)
    labels = labels_for(inputs)
    exact = widened(theirs)
    for model, given in ((theirs, inputs), (ours, inputs), (exact, widened(inputs))):
        model(**given, labels=labels).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2).step()
    expected, wide = dict(theirs.named_parameters()), dict(exact.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert_near(parameter, expected[parameter_name], apart(expected[parameter_name], wide[parameter_name]))


def test_half_precision(tmp_path: Path) -> None:
    config = tiny_idefics3()
    theirs, ours = reference_pair("Idefics3", config, Idefics3ForConditionalGeneration, tmp_path)
    assert_half_precision(theirs, ours, idefics3_inputs(config))


@pytest.mark.parametrize("name", ["shuffle2", "tied", "llama3_rope"])
def test_folders_load_both_ways(name: str, tmp_path: Path) -> None:
    config = tiny_idefics3(**CASES[name])
    theirs, ours = reference_pair("Idefics3", config, Idefics3ForConditionalGeneration, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    loaded, info = transformers.Idefics3ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = idefics3_inputs(config)
    assert_near(loaded(**inputs).logits, theirs(**inputs).logits, rounding(theirs, inputs))


@pytest.mark.parametrize("ends", [None, [7, 11, 50]])
def test_greedy_generation_of_ragged_prompts(ends: list[int] | None, tmp_path: Path) -> None:
    config = tiny_idefics3()
    theirs, ours = reference_pair("Idefics3", config, Idefics3ForConditionalGeneration, tmp_path)
    inputs = idefics3_inputs(config, "left")
    expected = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=0)
    actual = ours.generate(**inputs, max_new_tokens=20, eos_token_id=ends, pad_token_id=0)
    assert actual.tolist() == expected.tolist()
    assert len({tuple(row) for row in actual[:, -4:].tolist()}) > 1 or ends


def test_attention_weights(tmp_path: Path) -> None:
    config = tiny_idefics3()
    values = {key: value for key, value in config.items() if key != "model_type"}
    theirs, ours = reference_pair("Idefics3", config, Idefics3ForConditionalGeneration, tmp_path)
    eager = transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(**values, attn_implementation="eager")
    )
    eager.load_state_dict(theirs.state_dict())
    inputs = idefics3_inputs(config, "left")
    expected = eager.eval()(**inputs, output_attentions=True).attentions
    actual = ours(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    assert len(actual) == len(expected)
    error = rounding(theirs, inputs)  # eager attention has no float64
    for mine, other in zip(actual, expected):
        assert_near(mine.transpose(1, 2)[real], other.transpose(1, 2)[real], error)


def test_continuing_from_a_cache(tmp_path: Path) -> None:
    config = tiny_idefics3()
    theirs, ours = reference_pair("Idefics3", config, Idefics3ForConditionalGeneration, tmp_path)
    inputs = idefics3_inputs(config, "left")
    more = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(1))
    whole = ours(
        **{**inputs, "input_ids": torch.cat((inputs["input_ids"], more), 1)}
        | {"attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1)}
    )
    first = ours(**inputs, use_cache=True)
    second = ours(
        more,
        torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1),
        past_key_values=first.past_key_values,
    )
    assert_near(second.logits, whole.logits[:, -5:], rounding(theirs, inputs))
