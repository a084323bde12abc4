"""Ids the model does not know, at both doors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from m4train.errors import DataError
from m4train.models import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)
from m4train.models.checks import check_ids
from tests.helpers.models import packed_batch, tiny_idefics, tiny_idefics2, tiny_idefics3

MODELS = {
    "idefics": lambda: IdeficsForVisionText2Text(IdeficsConfig.from_dict(tiny_idefics())),
    "idefics2": lambda: Idefics2ForConditionalGeneration(Idefics2Config.from_dict(tiny_idefics2())),
    "idefics3": lambda: Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3())),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("bad", [-1, 99, 2**40])
def test_both_doors_say_the_same(family: str, bad: int) -> None:
    model: Any = MODELS[family]()
    known = model.config.token_rows - 1
    ids, good = torch.tensor([5, bad, 7]), torch.tensor([5, 6, 7])
    message = (
        f"^input_ids holds the id {bad}, but the model knows the ids 0 to {known}: use the tokenizer of this model$"
    )
    with pytest.raises(DataError, match=message):
        model(ids[None])
    with pytest.raises(DataError, match=message):
        model(replace(packed_batch([good]), input_ids=ids))
    rest = "use the tokenizer of this model, and -100 where nothing is to be predicted$"
    with pytest.raises(DataError, match=f"^labels holds the id {bad}, but .* 0 to {known}: {rest}"):
        model(good[None], labels=ids[None])
    with pytest.raises(DataError, match=f"^targets holds the id {bad}, but .* 0 to {known}: {rest}"):
        model(replace(packed_batch([good]), targets=torch.tensor([6, bad])))
    hidden = torch.tensor([[0, 1, 1]])
    assert torch.isfinite(
        model(good[None], hidden, labels=torch.tensor([[bad, -100, 7]])).loss
    )  # what never counts may


def test_other_devices_are_not_waited_for() -> None:
    check_ids("input_ids", torch.full((3,), 99, device="meta"), 5)
