"""What is asked of padding: losses, logits and generation as transformers gives them, with its attention "sdpa"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import m4train
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs, labels_for
from tests.parity.models_reference import reference_pair

FAMILIES: dict[str, tuple[str, Any, Any]] = {
    "Idefics": ("ForVisionText2Text", tiny_idefics, idefics_inputs),
    "Idefics2": ("ForConditionalGeneration", tiny_idefics2, idefics2_inputs),
    "Idefics3": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
    "SmolVLM": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
}
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A transformers model, ours with its weights, and what makes inputs for both. Without additional ids: there the loss of
    transformers fails. The Mistral window is shorter than the rows."""
    head, tiny, make = FAMILIES[request.param]
    changes = {"additional_vocab_size": 0} if request.param == "Idefics" else {"model_type": request.param.lower()}
    changes |= {"text_config": {"sliding_window": 5}} if request.param == "Idefics2" else {}
    config = tiny(**changes)
    folder = tmp_path_factory.mktemp(request.param)
    theirs, ours = reference_pair(request.param, config, getattr(m4train, request.param + head), folder)
    return theirs, ours, lambda side: make(config, side)


def labelled(inputs: dict[str, torch.Tensor], which: str) -> torch.Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if which == "usual":
        return labels_for(inputs)
    if which == "first":  # the first real token counts, which padding on its left predicts
        return ids.masked_fill(mask == 0, -100)
    if which == "padding":
        return ids.clone()
    if which == "none":
        return torch.full_like(ids, -100)
    return torch.randint(3, 80, ids.shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("which", ["usual", "first", "padding", "other", "none"])
def test_the_loss(pair: tuple[Any, Any, Any], which: str, side: str) -> None:
    theirs, ours, make = pair
    inputs = make(side)
    labels = labelled(inputs, which)
    expected = theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(ours(**inputs, labels=labels).loss, expected, equal_nan=True, **NEAR)
    tuples = ours(**inputs, labels=labels, return_dict=False)
    torch.testing.assert_close(tuples[0], expected, equal_nan=True, **NEAR)
    expected = theirs(**inputs, labels=labels, num_items_in_batch=11).loss
    torch.testing.assert_close(ours(**inputs, labels=labels, num_items_in_batch=11).loss, expected, **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_labels_at_padding(pair: tuple[Any, Any, Any], side: str) -> None:
    theirs, ours, make = pair
    inputs = make(side)
    found = []
    for model in (theirs, ours):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, gradient in found[0].items():
        if "embed_tokens.weight" in name:  # but for Idefics they train no embedding of the pad id, wherever it stands
            found[1][name][0] = gradient[0]
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("empty", ["all", "one row"])
def test_rows_without_a_real_token(pair: tuple[Any, Any, Any], empty: str) -> None:
    theirs, ours, make = pair
    inputs = make("left")
    mask = inputs["attention_mask"].clone()
    mask[2 if empty == "one row" else slice(None)] = 0
    inputs["attention_mask"] = mask
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_every_column(pair: tuple[Any, Any, Any], side: str) -> None:
    theirs, ours, make = pair
    inputs = make(side)
    expected = theirs(**inputs).logits
    torch.testing.assert_close(ours(**inputs, every_column=True).logits, expected, **NEAR)
    plain = ours(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(plain[real], expected[real], **NEAR)
    assert not plain[~real].any()


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_that_ends_in_padding(pair: tuple[Any, Any, Any]) -> None:
    theirs, ours, make = pair
    inputs = make("right")
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}
    expected = theirs.generate(**inputs, **asked)
    assert ours.generate(**inputs, **asked).tolist() == expected.tolist()
    beams = theirs.generate(**inputs, **asked, num_beams=3)
    assert ours.generate(**inputs, **asked, num_beams=3).tolist() == beams.tolist()
