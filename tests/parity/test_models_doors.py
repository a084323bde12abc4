"""The documented arguments in addition to input_ids and pixel_values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m4train.errors import DataError
from m4train.models import (
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsModel,
)
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.helpers.rounding import assert_near
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs, labels_for
from tests.parity.models_reference import reference_pair, rounding

FAMILIES: dict[str, tuple[str, type, Any, Any]] = {
    "idefics": ("Idefics", IdeficsForVisionText2Text, tiny_idefics, idefics_inputs),
    "idefics2": ("Idefics2", Idefics2ForConditionalGeneration, tiny_idefics2, idefics2_inputs),
    "idefics3": ("Idefics3", Idefics3ForConditionalGeneration, tiny_idefics3, idefics3_inputs),
}


def make(family: str, folder: Path, **changes: Any) -> tuple[Any, Any, dict[str, torch.Tensor], torch.Tensor]:
    kind, ours_class, tiny, build = FAMILIES[family]
    config = tiny(**changes)
    theirs, ours = reference_pair(kind, config, ours_class, folder)
    inputs = build(config, "left")
    return theirs, ours, inputs, inputs["attention_mask"].bool()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_place_of_ids(family: str, tmp_path: Path) -> None:
    theirs, ours, inputs, real = make(family, tmp_path)
    expected, error = theirs(**inputs).logits[real], rounding(theirs, inputs)
    embeds = theirs.get_input_embeddings()(inputs.pop("input_ids"))
    assert_near(ours(inputs_embeds=embeds, **inputs).logits[real], expected, error)
    with pytest.raises(DataError, match="give exactly one of input_ids and inputs_embeds"):
        ours(input_ids=torch.ones(3, 4, dtype=torch.int64), inputs_embeds=embeds)
    with pytest.raises(DataError, match="give exactly one of input_ids and inputs_embeds"):
        ours(attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("family", FAMILIES)
def test_position_ids(family: str, tmp_path: Path) -> None:
    theirs, ours, inputs, real = make(family, tmp_path)
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, -1) * 3 + torch.tensor([[0], [5], [9]])
    inputs["position_ids"] = positions
    assert_near(ours(**inputs).logits[real], theirs(**inputs).logits[real], rounding(theirs, inputs))


def test_holes_in_the_attention_mask(tmp_path: Path) -> None:
    theirs, ours, inputs, _ = make("idefics3", tmp_path)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    hidden = (ids != 90) & (torch.arange(ids.shape[1]) % 5 == 4) & mask.bool()
    inputs["attention_mask"] = mask.masked_fill(hidden, 0)
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits
    error = rounding(theirs, inputs)
    assert_near(ours(**inputs).logits[real], expected[real], error)
    assert_near(ours(**inputs, labels=ids).loss, theirs(**inputs, labels=ids).loss, error)  # holes count too


@pytest.mark.parametrize("family", FAMILIES)
def test_last_columns_only(family: str, tmp_path: Path) -> None:
    theirs, ours, inputs, _ = make(family, tmp_path)
    whole, error = ours(**inputs).logits, rounding(theirs, inputs)
    assert_near(ours(**inputs, logits_to_keep=1).logits, whole[:, -1:], error)
    assert_near(ours(**inputs, logits_to_keep=torch.tensor([2, 9])).logits, whole[:, [2, 9]], error)


@pytest.mark.parametrize("family", FAMILIES)
def test_tuples(family: str, tmp_path: Path) -> None:
    _, ours, inputs, _ = make(family, tmp_path)
    output = ours(**inputs, labels=labels_for(inputs), use_cache=False, output_hidden_states=True)
    values = ours(**inputs, labels=labels_for(inputs), use_cache=False, output_hidden_states=True, return_dict=False)
    assert len(values) == 4
    assert torch.equal(values[0], output.loss)
    assert torch.equal(values[1], output["logits"])
    assert torch.equal(output[1], output.logits)
    assert len(values[2]) == len(output.hidden_states)


def test_number_of_items(tmp_path: Path) -> None:
    theirs, ours, inputs, _ = make("idefics3", tmp_path)
    labels = labels_for(inputs)
    expected = theirs(**inputs, labels=labels, num_items_in_batch=7).loss
    assert_near(ours(**inputs, labels=labels, num_items_in_batch=7).loss, expected, rounding(theirs, inputs))


@pytest.mark.parametrize("family", ["idefics2", "idefics3"])
def test_image_features_in_place_of_pixels(family: str, tmp_path: Path) -> None:
    theirs, ours, inputs, _ = make(family, tmp_path)
    expected, error = ours(**inputs), rounding(theirs, inputs)
    pixels, mask = inputs.pop("pixel_values"), inputs.pop("pixel_attention_mask")
    features = ours.model.get_image_features(pixels, mask)
    assert_near(expected.image_hidden_states, features, error)
    assert_near(ours(**inputs, image_hidden_states=features).logits, expected.logits, error)
    with pytest.raises(DataError, match="both pixel_values and image_hidden_states are given"):
        ours(**inputs, pixel_values=pixels, image_hidden_states=features)
    with pytest.raises(DataError, match="image tokens"):
        ours(**inputs, image_hidden_states=features[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_as_tuples(family: str, tmp_path: Path) -> None:
    theirs, ours, inputs, _ = make(family, tmp_path)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    error = rounding(theirs, inputs)
    if family == "idefics":
        inputs = {"input_ids": ids, "attention_mask": mask}
    first = ours(**inputs, use_cache=True).past_key_values
    layers = tuple(tuple(x.clone() for x in first[i]) for i in range(len(first)))
    more = torch.randint(3, 80, (3, 2), generator=torch.Generator().manual_seed(1))
    longer = torch.cat((mask, torch.ones_like(more)), 1)
    place = {"position_ids": torch.arange(ids.shape[1], ids.shape[1] + 2).expand(3, -1)} if family != "idefics" else {}
    expected = ours(more, longer, past_key_values=first, **place).logits
    assert_near(ours(more, longer, past_key_values=layers, **place).logits, expected, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mask_of_another_shape(family: str, tmp_path: Path) -> None:
    _, ours, inputs, _ = make(family, tmp_path)
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(DataError, match="attention_mask has shape"):
        ours(**inputs)


@pytest.mark.parametrize(("model", "config"), [(Idefics3Model, Idefics3Config), (IdeficsModel, IdeficsConfig)])
def test_a_model_of_the_default_configuration(model: Any, config: Any) -> None:
    """As in the documentation; on the meta device, because the defaults are large."""
    configuration = config()
    with torch.device("meta"):
        assert model(configuration).config is configuration


def test_prompt_without_images(tmp_path: Path) -> None:
    theirs, ours, _, _ = make("idefics", tmp_path)
    ids = torch.tensor([[1, 5, 9, 30]])
    inputs = {"pixel_values": torch.zeros(1, 1, 3, 16, 16), "image_attention_mask": torch.zeros(1, 4, 1)}
    expected = theirs.generate(ids, **inputs, max_length=30, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert ours.generate(ids, max_length=30, eos_token_id=2, pad_token_id=0).tolist() == expected.tolist()
