"""Idefics against transformers, all weights perturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from m4train.errors import DataError
from m4train.models import IdeficsForVisionText2Text
from tests.helpers.models import tiny_idefics
from tests.helpers.rounding import apart, assert_near, widened
from tests.parity.models_inputs import idefics_inputs, real_labels
from tests.parity.models_reference import (
    assert_half_precision,
    assert_same_gradients,
    exact_gradients,
    gradients,
    reference_pair,
    rounding,
    transformers,
)

NO_NORMS = {"qk_layer_norms": False, "perceiver_config": {"qk_layer_norms_perceiver": False}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_resampler": {"use_resampler": False},
    "no_qk_norms": NO_NORMS,
    "vector_gates": {"alpha_type": "vector"},
    "interval_one": {"cross_layer_interval": 1},
    "no_additional_ids": {"additional_vocab_size": 0},
    "tied": {"tie_word_embeddings": True},
    "all_off": {**NO_NORMS, "use_resampler": False, "alpha_type": "vector", "additional_vocab_size": 0},
}


def pair(config: dict[str, Any], folder: Path, **load: Any) -> tuple[Any, Any]:
    return reference_pair("Idefics", config, IdeficsForVisionText2Text, folder, **load)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Written out: the current release cannot compute it with additional ids."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_loss_and_gradients(name: str, side: str, tmp_path: Path) -> None:
    config = tiny_idefics(**CASES[name])
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config, side)
    labels = real_labels(inputs)
    logits = theirs(**inputs).logits
    actual = ours(**inputs, labels=labels, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    error = rounding(theirs, inputs)
    assert_near(actual.logits[real], logits[real], error)
    expected = mean_loss(logits, labels)
    assert_near(actual.loss, expected, error)
    assert len(actual.hidden_states) == config["num_hidden_layers"] + 1
    found, wanted = gradients(ours, actual.loss), gradients(theirs, expected)
    # What nothing reads has no gradient there, and one of zeros here.
    unread = {key for key in found if ".post_layernorm." in key}
    assert unread
    assert not any(found.pop(key).any() for key in unread)
    exact = exact_gradients(theirs, lambda model, given: mean_loss(model(**given).logits, labels), inputs)
    assert_same_gradients(found, wanted, exact)


@pytest.mark.parametrize("name", ["plain", "interval_one"])
def test_hidden_states_and_attentions(name: str, tmp_path: Path) -> None:
    config = tiny_idefics(**CASES[name])
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config, "left")
    error = rounding(theirs, inputs)  # eager attention has no float64
    theirs.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected, actual = theirs(**inputs, **wanted), ours(**inputs, **wanted)
    real = inputs["attention_mask"].bool()
    assert len(actual.hidden_states) == len(expected.hidden_states)
    assert len(actual.attentions) == len(expected.attentions) == config["num_hidden_layers"]
    for mine, other in zip(actual.hidden_states[1:], expected.hidden_states[1:]):
        assert_near(mine[real], other[real], error)
    # The current release records the input of the first decoder layer, behind the first gated one; 4.46 the embeddings.
    assert torch.equal(actual.hidden_states[0][real], theirs.get_input_embeddings()(inputs["input_ids"])[real])
    for mine, other in zip(actual.attentions, expected.attentions):
        assert_near(mine.transpose(1, 2)[real], other.transpose(1, 2)[real], error)


def test_text_only(tmp_path: Path) -> None:
    config = tiny_idefics()
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config)
    inputs["pixel_values"] = torch.zeros(3, 1, 3, 16, 16)
    inputs["image_attention_mask"] = torch.zeros(3, 14, 1, dtype=torch.bool)
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits[real]
    error = rounding(theirs, inputs)
    assert_near(ours(**inputs).logits[real], expected, error)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert_near(ours(**text).logits[real], expected, error)


def test_an_image_no_token_sees_changes_nothing(tmp_path: Path) -> None:
    config = tiny_idefics()
    _, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config)
    inputs["image_attention_mask"][0, :, 1] = 0
    before = ours(**inputs).logits
    inputs["pixel_values"][0, 1] *= 3
    assert torch.equal(ours(**inputs).logits, before)


@pytest.mark.parametrize("size", [24, 20, 12, 17, 19])
def test_interpolated_positions(size: int, tmp_path: Path) -> None:
    config = tiny_idefics()
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config, size=size)
    real = inputs["attention_mask"].bool()
    with pytest.raises(DataError, match=f"{size} x {size} pixels, but the vision tower takes 16 x 16"):
        ours(**inputs)
    inputs["interpolate_pos_encoding"] = True
    assert_near(ours(**inputs).logits[real], theirs(**inputs).logits[real], rounding(theirs, inputs))


@pytest.mark.parametrize("shape", [(17, 18), (16, 19), (18, 22), (20, 40), (16, 24)])
def test_interpolated_positions_of_frames_that_are_not_square(shape: tuple[int, int], tmp_path: Path) -> None:
    config = tiny_idefics()
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config)
    generator = torch.Generator().manual_seed(6)
    inputs["pixel_values"] = torch.randn(3, 2, 3, *shape, generator=generator)
    real = inputs["attention_mask"].bool()
    inputs["interpolate_pos_encoding"] = True
    assert_near(ours(**inputs).logits[real], theirs(**inputs).logits[real], rounding(theirs, inputs))


@pytest.mark.parametrize("resampler", [True, False])
def test_precomputed_images(resampler: bool, tmp_path: Path) -> None:
    config = tiny_idefics(use_resampler=resampler)
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config)
    real = inputs["attention_mask"].bool()
    pixels = inputs.pop("pixel_values")
    encoded = theirs.model.vision_model(pixels.flatten(0, 1)).last_hidden_state.unflatten(0, (3, 2))
    expected = theirs(**inputs, image_encoder_embeddings=encoded).logits
    error = rounding(theirs, {**inputs, "image_encoder_embeddings": encoded})
    assert_near(ours(**inputs, image_encoder_embeddings=encoded).logits[real], expected[real], error)
    if resampler:
        latents = theirs.model.perceiver_resampler(encoded.flatten(0, 1)).unflatten(0, (3, 2))
        assert_near(ours(**inputs, perceiver_embeddings=latents).logits[real], expected[real], error)
        shown = ours(**inputs, perceiver_embeddings=latents).image_hidden_states
        assert torch.equal(shown, latents)
    with pytest.raises(DataError, match="pixel_values and image_encoder_embeddings are given"):
        ours(**inputs, pixel_values=pixels, image_encoder_embeddings=encoded)


def test_one_optimizer_step(tmp_path: Path) -> None:
    config = tiny_idefics()
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config)
    labels = real_labels(inputs)
    exact = widened(theirs)
    mean_loss(exact(**widened(inputs)).logits, labels).backward()
    mean_loss(theirs(**inputs).logits, labels).backward()
    ours(**inputs, labels=labels).loss.backward()
    for model in (theirs, ours, exact):
        torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2, weight_decay=0.0).step()
    expected, wide = dict(theirs.named_parameters()), dict(exact.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert_near(parameter, expected[parameter_name], apart(expected[parameter_name], wide[parameter_name]))


def test_half_precision(tmp_path: Path) -> None:
    config = tiny_idefics()
    theirs, ours = pair(config, tmp_path)
    assert_half_precision(theirs, ours, idefics_inputs(config))


@pytest.mark.parametrize("name", ["plain", "tied", "all_off"])
def test_folders_load_both_ways(name: str, tmp_path: Path) -> None:
    config = tiny_idefics(**CASES[name])
    theirs, ours = pair(config, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    loaded, info = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = idefics_inputs(config)
    assert_near(loaded(**inputs).logits, theirs(**inputs).logits, rounding(theirs, inputs))


@pytest.mark.parametrize("name", ["plain", "no_resampler"])
def test_greedy_generation_of_ragged_prompts(name: str, tmp_path: Path) -> None:
    config = tiny_idefics(**CASES[name])
    theirs, ours = pair(config, tmp_path)
    inputs = idefics_inputs(config, "left")
    expected = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=[2, 7], pad_token_id=0)
    actual = ours.generate(**inputs, max_new_tokens=20, eos_token_id=[2, 7], pad_token_id=0)
    assert actual.tolist() == expected.tolist()


def test_images_are_encoded_once_while_generating(tmp_path: Path) -> None:
    _, ours = pair(tiny_idefics(), tmp_path)
    calls = []
    ours.model.vision_model.register_forward_hook(lambda *_: calls.append("tower"))
    ours.model.gated_cross_attn_layers[0].cross_attn.k_proj.register_forward_hook(lambda *_: calls.append("keys"))
    ours.generate(**idefics_inputs(tiny_idefics(), "left"), max_new_tokens=5, eos_token_id=[])
    assert calls == ["tower", "keys"]


def test_bad_image_arguments(tmp_path: Path) -> None:
    _, ours = pair(tiny_idefics(), tmp_path)
    inputs = idefics_inputs(tiny_idefics())
    mask = inputs.pop("image_attention_mask")
    with pytest.raises(DataError, match="pixel_values is given without image_attention_mask"):
        ours(**inputs)
    with pytest.raises(DataError, match=r"\(3, 14, 1\), but pixel_values holds 2 images per sample"):
        ours(**inputs, image_attention_mask=mask[:, :, :1])
