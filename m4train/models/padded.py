"""The padded door: rows of the documented (B, T) arguments turned into the packed form, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4train.batch import IGNORE_INDEX, Segments
from m4train.errors import DataError
from m4train.models.contexts import KeyValueCache


@dataclass(frozen=True)
class PaddedTokens:
    """The real tokens of a padded batch: token i is at (`rows`[i], `columns`[i]) of `shape` (B, T)."""

    rows: Tensor
    columns: Tensor
    segments: Segments
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> PaddedTokens:
        """From an attention mask (B, T) of 0 and 1; each row becomes a segment, wherever its padding is."""
        rows, columns = torch.nonzero(mask, as_tuple=True)
        lengths = [n for n in mask.bool().sum(1).tolist() if n]
        return cls(rows, columns, Segments.of(lengths, mask.device), (mask.shape[0], mask.shape[1]))

    def flatten(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (tokens, ...)"""
        return x[self.rows, self.columns]

    def unflatten(self, x: Tensor) -> Tensor:
        """(tokens, ...) -> (B, T, ...), zeros at padding."""
        if x.shape[0] == self.shape[0] * self.shape[1]:
            return x.unflatten(0, self.shape)
        out = x.new_zeros(*self.shape, *x.shape[1:])
        return out.index_put((self.rows, self.columns), x)


def as_tensor(name: str, value: Any, device: torch.device) -> Any:
    """Lists and arrays, as processors give them when no tensors are asked for, as a tensor; anything else as it is.

    Raises:
        DataError: rows of different lengths.
    """
    if not isinstance(value, list | tuple | np.ndarray):
        return value
    try:
        return torch.from_numpy(np.asarray(value)).to(device)
    except (TypeError, ValueError):  # what numpy and torch say depends on their version
        raise DataError(
            f"{name} is a list that cannot become a tensor: give rows of equal length, as the processor does with padding=True"
        ) from None


def input_mask(
    attention_mask: Tensor | None, shape: tuple[int, int], cache: KeyValueCache | None, device: torch.device
) -> Tensor:
    """The (B, T) mask of the new columns, from an attention mask that may also cover the columns of the cache.

    Raises:
        DataError: the mask has another shape.
    """
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    past = cache.length if cache is not None else 0
    if attention_mask.shape[0] != shape[0] or attention_mask.shape[1] not in (shape[1], past + shape[1]):
        raise DataError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the inputs have {shape} after {past} cached "
            "columns: give one value per column"
        )
    return attention_mask[:, attention_mask.shape[1] - shape[1] :].bool()


def shifted_targets(labels: Tensor, tokens: PaddedTokens, ignored: int | None) -> tuple[Tensor, Tensor]:
    """Which flat positions predict something, and what, from labels (B, T).

    A label counts if it is neither -100 nor `ignored` (the image token) and both it and the token before it are real.

    Returns:
        positions (L,) on the flat axis, and targets (L,).
    """
    flat = tokens.flatten(labels)
    adjacent = (tokens.rows[1:] == tokens.rows[:-1]) & (tokens.columns[1:] == tokens.columns[:-1] + 1)
    counted = adjacent & (flat[1:] != IGNORE_INDEX)
    if ignored is not None:
        counted &= flat[1:] != ignored
    positions = torch.nonzero(counted)[:, 0]
    return positions, flat[positions + 1]


def real_images(pixel_values: Tensor) -> Tensor:
    """(B, N) bool: which images of (B, N, 3, H, W) are not padding, that is, not zero throughout."""
    if pixel_values.dim() != 5:
        raise DataError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: it must be (batch, images, channels, height, width)"
        )
    if not pixel_values.is_floating_point():
        raise DataError(f"pixel_values are {pixel_values.dtype}: normalise them with the image processor of this model")
    return (pixel_values != 0).flatten(2).any(-1)


def check_image_counts(found: Tensor, expected: Tensor, per_image: int) -> None:
    """Compares image tokens per row `found` (B,) with the tokens the images of each row give.

    Raises:
        DataError: they differ in some row.
    """
    wrong = torch.nonzero(found != expected)[:, 0].tolist()
    if wrong:
        row = wrong[0]
        raise DataError(
            f"sample {row} of the batch holds {int(found[row])} image tokens, but its {int(expected[row]) // per_image} "
            f"images give {int(expected[row])} ({per_image} each): make text and images agree"
        )
