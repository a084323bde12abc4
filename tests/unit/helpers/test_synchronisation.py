"""What makes the host wait is noticed, and what does not is let through; on the CPU, which stands for any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.synchronisation import Synchronisations

WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: int(x.max()),
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x[0]),
    "nonzero": torch.nonzero,
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "masked write": lambda x: x.clone().__setitem__(x > 1, torch.zeros(2)),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "equal": lambda x: torch.equal(x, x + 0),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 1, 1])),
    "as an index": lambda x: [1, 2, 3, 4][x.argmax()],
    "to another device": lambda x: x.to("meta"),
    "copied": lambda x: torch.empty(4, device="meta").copy_(x),
}
GOES_ON: dict[str, Callable[[Tensor], Any]] = {
    "index": lambda x: x[torch.tensor([0, 2])],
    "slice": lambda x: x[1:3],
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, torch.tensor([1, 2, 1, 1]), output_size=5),
    "half": lambda x: x.half(),
    "copied": lambda x: torch.empty(4).copy_(x),
    "sort": lambda x: x.sort(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_noticed(name: str) -> None:
    x = torch.arange(4.0)
    with Synchronisations() as seen:
        WAITS[name](x)
    assert len(seen.found) >= 1


@pytest.mark.parametrize("name", GOES_ON)
def test_what_needs_no_data_goes_on(name: str) -> None:
    x = torch.arange(4.0)
    with Synchronisations() as seen:
        GOES_ON[name](x)
    assert seen.found == []


def test_the_line_is_named() -> None:
    from m4train.models.padded import needs_padding

    with Synchronisations() as seen:
        needs_padding(torch.ones(2, 3, dtype=torch.bool), None)
    assert seen.found[0].startswith("aten._local_scalar_dense.default at models/padded.py:")
