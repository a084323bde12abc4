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

    @classmethod
    def every(cls, shape: tuple[int, int], device: torch.device) -> PaddedTokens:
        """All columns of `shape` (B, T), padding included, without waiting for the device."""
        rows = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
        columns = torch.arange(shape[1], device=device).repeat(shape[0])
        return cls(rows, columns, Segments.uniform(shape[0], shape[1], device), shape)

    def flatten(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (tokens, ...)"""
        if len(self.rows) == self.shape[0] * self.shape[1]:
            return x.flatten(0, 1)
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


def needs_padding(mask: Tensor, labels: Tensor | None) -> bool:
    """Whether something is asked of the padding of `mask` (B, T) bool: a row holds nothing else, or a label (B, T) that counts
    is at padding or follows it."""
    if bool(mask.all()):
        return False
    if not bool(mask.any(1).all()):
        return True
    if labels is None or labels.shape != mask.shape:
        return False
    return bool(((labels[:, 1:] != IGNORE_INDEX) & ~(mask[:, 1:] & mask[:, :-1])).any())


class HiddenStates:
    """Collects hidden states (B, T, H) on their way through a model, so that gradients that reach it pass through them."""

    def __init__(self, tokens: PaddedTokens) -> None:
        self.tokens = tokens
        self.states: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        """Takes note of `hidden` (tokens, H), and returns what the model goes on with."""
        self.states.append(self.tokens.unflatten(hidden))
        return self.tokens.flatten(self.states[-1])


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
