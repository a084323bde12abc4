"""Idefics2 against transformers, all weights perturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m4train.errors import DataError
from m4train.models import Idefics2Config, Idefics2ForConditionalGeneration
from m4train.positions import patch_position_ids
from tests.helpers.models import IMAGE_TOKEN, tiny_idefics2
from tests.helpers.rounding import apart, assert_near, widened
from tests.parity.models_inputs import idefics2_inputs, labels_for
from tests.parity.models_reference import (
    assert_half_precision,
    assert_same_gradients,
    exact_gradients,
    gradients,
    reference_pair,
    rounding,
    transformers,
)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "perceiver_eps": {"perceiver_config": {"rms_norm_eps": 1e-2}},
    "perceiver_width": {"perceiver_config": {"hidden_size": 4096}},
    "window": {"text_config": {"sliding_window": 5}},
    "window_of_one": {"text_config": {"sliding_window": 1}},
    "no_window": {"text_config": {"sliding_window": None}},
    "tied": {"tie_word_embeddings": True},
    "odd": {"text_config": {"head_dim": 12}, "perceiver_config": {"resampler_n_latents": 3, "resampler_n_heads": 2}},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_loss_and_gradients(name: str, side: str, tmp_path: Path) -> None:
    config = tiny_idefics2(**CASES[name])
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config, side)
    labels = labels_for(inputs)
    expected = theirs(**inputs, labels=labels)
    actual = ours(**inputs, labels=labels)
    real = inputs["attention_mask"].bool()
    error = rounding(theirs, inputs)
    assert_near(actual.logits[real], expected.logits[real], error)
    assert_near(actual.loss, expected.loss, error)
    exact = exact_gradients(theirs, lambda model, given: model(**given, labels=labels).loss, inputs)
    assert_same_gradients(gradients(ours, actual.loss), gradients(theirs, expected.loss), exact)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_weights(window: int | None, tmp_path: Path) -> None:
    config = tiny_idefics2(text_config={"sliding_window": window})
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config, "left")
    error = rounding(theirs, inputs)  # eager attention has no float64
    theirs.set_attn_implementation("eager")
    expected = theirs(**inputs, output_attentions=True).attentions
    actual = ours(**inputs, output_attentions=True)
    real = inputs["attention_mask"].bool()
    assert_near(actual.logits[real], theirs(**inputs).logits[real], error)
    assert len(actual.attentions) == len(expected)
    for mine, other in zip(actual.attentions, expected):
        assert_near(mine.transpose(1, 2)[real], other.transpose(1, 2)[real], error)


def test_images_smaller_than_a_patch() -> None:
    model = Idefics2ForConditionalGeneration(Idefics2Config.from_dict(tiny_idefics2()))
    ids = torch.tensor([[5, *[90] * 6, 6]])
    with pytest.raises(DataError, match="pixel_values are 3 x 9 pixels, but a patch of the vision tower takes 4 x 4"):
        model(ids, pixel_values=torch.ones(1, 1, 3, 3, 9))


def test_images_without_mask(tmp_path: Path) -> None:
    config = tiny_idefics2()
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config)
    del inputs["pixel_attention_mask"]
    real = inputs["attention_mask"].bool()
    assert_near(ours(**inputs).logits[real], theirs(**inputs).logits[real], rounding(theirs, inputs))


def test_canvas_padding_changes_nothing(tmp_path: Path) -> None:
    config = tiny_idefics2()
    _, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config)
    larger = dict(inputs)
    larger["pixel_values"] = torch.nn.functional.pad(inputs["pixel_values"], (0, 12, 0, 7), value=3.0)
    larger["pixel_attention_mask"] = torch.nn.functional.pad(inputs["pixel_attention_mask"], (0, 12, 0, 7))
    larger["pixel_values"][0, 0][:, 20:] = 9.0  # beyond the last whole patch
    unused = (~inputs["pixel_attention_mask"].bool().any((-1, -2)))[:, :, None, None, None]
    larger["pixel_values"] = larger["pixel_values"].masked_fill(unused, 0.0)
    assert torch.equal(ours(**inputs).logits, ours(**larger).logits)


def test_order_of_samples_changes_nothing(tmp_path: Path) -> None:
    config = tiny_idefics2()
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config)
    turned = {key: value.flip(0) for key, value in inputs.items()}
    assert_near(ours(**turned).logits.flip(0), ours(**inputs).logits, rounding(theirs, inputs))


def test_mask_must_be_a_rectangle(tmp_path: Path) -> None:
    config = tiny_idefics2()
    _, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config)
    inputs["pixel_attention_mask"][1, 0, 10, 10] = 0
    with pytest.raises(DataError, match="of image 2 marks no rectangle of whole 4 x 4 patches"):
        ours(**inputs)


def test_one_optimizer_step(tmp_path: Path) -> None:
    config = tiny_idefics2()
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config)
    labels = labels_for(inputs)
    exact = widened(theirs)
    for model, given in ((theirs, inputs), (ours, inputs), (exact, widened(inputs))):
        model(**given, labels=labels).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2).step()
    expected, wide = dict(theirs.named_parameters()), dict(exact.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert_near(parameter, expected[parameter_name], apart(expected[parameter_name], wide[parameter_name]))


def test_half_precision(tmp_path: Path) -> None:
    config = tiny_idefics2()
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    assert_half_precision(theirs, ours, idefics2_inputs(config))


def test_folders_load_both_ways(tmp_path: Path) -> None:
    config = tiny_idefics2()
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    loaded, info = transformers.Idefics2ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = idefics2_inputs(config)
    assert_near(loaded(**inputs).logits, theirs(**inputs).logits, rounding(theirs, inputs))


@pytest.mark.parametrize("window", [None, 4])
def test_greedy_generation_of_ragged_prompts(window: int | None, tmp_path: Path) -> None:
    config = tiny_idefics2(text_config={"sliding_window": window})
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    inputs = idefics2_inputs(config, "left")
    expected = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=[2, 7], pad_token_id=0)
    actual = ours.generate(**inputs, max_new_tokens=20, eos_token_id=[2, 7], pad_token_id=0)
    assert actual.tolist() == expected.tolist()


def reference_buckets(side: int) -> dict[tuple[int, int], list[int]]:
    """Position ids of an image of n x 1 and of 1 x n patches, read out of the tower's embedding table."""
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = transformers.models.idefics2.configuration_idefics2.Idefics2VisionConfig(
        hidden_size=1, image_size=2 * side, patch_size=2, num_attention_heads=1
    )
    tower = Idefics2VisionEmbeddings(config)
    with torch.no_grad():
        for parameter in tower.patch_embedding.parameters():
            parameter.zero_()
        tower.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
    found = {}
    for n in range(1, side + 1):
        for rows, columns in ((n, 1), (1, n)):
            mask = torch.ones(1, rows, columns, dtype=torch.bool)
            out = tower(torch.zeros(1, 3, 2 * rows, 2 * columns), mask)
            found[rows, columns] = out.flatten().long().tolist()
    return found


@pytest.mark.parametrize("side", [7, 26, 70])
def test_position_ids_as_in_5_23(side: int) -> None:
    for (rows, columns), expected in reference_buckets(side).items():
        assert patch_position_ids(rows, columns, side, "5.23").tolist() == expected


def test_a_grid_on_which_the_roundings_differ(tmp_path: Path) -> None:
    config = tiny_idefics2(vision_config={"image_size": 140, "patch_size": 2})
    theirs, ours = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 6, 9]])
    pixels = torch.randn(1, 1, 3, 100, 4, generator=torch.Generator().manual_seed(0))
    expected = theirs(input_ids=ids, pixel_values=pixels).logits
    error = rounding(theirs, {"input_ids": ids, "pixel_values": pixels})
    assert apart(ours(input_ids=ids, pixel_values=pixels).logits, expected) > 10 * error
    ours.model.position_rounding = "5.23"
    assert_near(ours(input_ids=ids, pixel_values=pixels).logits, expected, error)


def test_where_the_roundings_differ() -> None:
    """For a table of 70, as the reference notes them."""
    differing = {
        rounding: [
            n
            for n in range(1, 71)
            if not torch.equal(patch_position_ids(n, 1, 70), patch_position_ids(n, 1, 70, rounding))
        ]
        for rounding in ("5.23", "4.46")
    }
    assert differing["5.23"] == [25, 49, 50, 55]
    assert 50 in differing["4.46"]


def test_exact_position_ids() -> None:
    for side in (1, 7, 70):
        for rows in range(1, side + 1):
            for columns in (1, side // 2 + 1, side):
                expected = [
                    (i * side // rows) * side + j * side // columns for i in range(rows) for j in range(columns)
                ]
                assert patch_position_ids(rows, columns, side).tolist() == expected
