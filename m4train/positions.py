"""Position ids of the patches of an image of any shape, in the square table of a vision tower (Idefics2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from m4train.errors import ConfigError

ROUNDINGS = ("exact", "5.23", "4.57", "4.46")


def patch_position_ids(rows: int, columns: int, side: int, rounding: str = "exact") -> Tensor:
    """(rows * columns,) int64: where each patch of a grid falls in a table of `side` x `side`, row by row.

    Args:
        rounding: "exact" is floor(i * side / n); "5.23", "4.57" and "4.46" repeat the fp32 arithmetic of those releases of
            transformers, which puts some rows of some grids one place off.

    Raises:
        ConfigError: an unknown rounding.
    """
    return (_buckets(rows, side, rounding)[:, None] * side + _buckets(columns, side, rounding)).flatten()


@lru_cache(maxsize=4096)
def _buckets(count: int, side: int, rounding: str) -> Tensor:
    if rounding == "exact":
        return torch.arange(count) * side // count
    if rounding == "5.23":
        fractions = (torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))).clamp(max=1.0 - 1e-6)
    elif rounding == "4.57":  # what falls on a boundary is put before it: a grid as large as the table is one place off
        fractions = torch.arange(count, dtype=torch.float32) / count * (1 - 1e-6)
    elif rounding == "4.46":
        fractions = torch.arange(0, 1 - 1e-6, (1 / torch.tensor(count)).item(), dtype=torch.float32)
    else:
        raise ConfigError(f"position rounding {rounding!r} is unknown: choose one of {', '.join(ROUNDINGS)}")
    boundaries = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32)
    return torch.bucketize(fractions, boundaries, right=True)
