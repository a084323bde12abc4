"""Prompts that begin alike, images included, such as several questions about one image: the beginning is read once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value -> integers of as many


@dataclass(frozen=True)
class Beginnings:
    """What is read first: the first `lengths[i]` tokens of the row `rows[i]`; row r of the batch goes on from the `group[r]`-th
    of them."""

    rows: list[int]
    lengths: list[int]
    group: list[int]


def beginnings(
    prompts: Sequence[Sequence[int]], pixels: Tensor, pixel_mask: Tensor | None, image_token: int
) -> Beginnings | None:
    """The beginnings that some rows share; None if each row has one of its own.

    Args:
        prompts: the ids of each row, without padding.
        pixels: (B, N, 3, H, W) images of each row, zeros behind them; `pixel_mask` (B, N, H, W) which pixels are real.
        image_token: rows share what has images only, and all of them.
    """
    rows: list[int] = []
    group: list[int] = []
    lengths: list[int] = []
    sums = [_sums(pixels), _sums(pixel_mask)]
    for row, prompt in enumerate(prompts):
        images = prompt.count(image_token)
        for place, other in enumerate(rows):
            alike = images and all(each is None or each[row] == each[other] for each in sums)
            length = min(_alike(prompt, prompts[other]), lengths[place], len(prompt) - 1) if alike else 0
            whole = length and prompt[:length].count(image_token) == images == prompts[other].count(image_token)
            if whole and _equal(pixels, row, other) and _equal(pixel_mask, row, other):
                lengths[place] = length
                group.append(place)
                break
        else:
            group.append(len(rows))
            rows.append(row)
            lengths.append(len(prompt) - 1)
    return Beginnings(rows, lengths, group) if len(rows) < len(prompts) else None


def each_alone(prompts: Sequence[Sequence[int]]) -> Beginnings:
    """Every row read up to its last token: as many passes as if some were shared, for ranks that must make as many."""
    numbers = list(range(len(prompts)))
    return Beginnings(numbers, [len(prompt) - 1 for prompt in prompts], numbers)


def _alike(prompt: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two prompts begin with alike."""
    for place, (one, two) in enumerate(zip(prompt, other)):
        if one != two:
            return place
    return min(len(prompt), len(other))


def _sums(values: Tensor | None) -> list[int] | None:
    """A number for each row of (B, ...), the same for rows that are equal."""
    if values is None:
        return None
    return values.flatten(1).contiguous().view(_WHOLE[values.element_size()]).sum(1, dtype=torch.int64).tolist()


def _equal(values: Tensor | None, row: int, other: int) -> bool:
    return values is None or torch.equal(values[row], values[other])


def distinct(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (D,) of the frames (F, ...) that differ, each at its first place, and (F,) which of them each frame is."""
    sums = _sums(frames)
    assert sums is not None
    kept: list[int] = []
    which: list[int] = []
    for number, value in enumerate(sums):
        same = [
            place for place, one in enumerate(kept) if sums[one] == value and torch.equal(frames[one], frames[number])
        ]
        which.append(same[0] if same else len(kept))
        if not same:
            kept.append(number)
    return torch.tensor(kept, device=frames.device), torch.tensor(which, device=frames.device)
