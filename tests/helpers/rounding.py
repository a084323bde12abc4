"""Bounds on rounding that hold on every processor: each comes from the reference's own error in the same run.

Kernels of different processors add in different orders and round at different places, so that no constant says how far two
right results may be apart. The reference says it itself: its error is how far it moves when it is computed in float64, or by
another of its own kernels. What computes the same makes an error of that size, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Two right results, each in error by the reference's error, are up to twice that apart; and as an error is one draw of many,
# the largest of one may be twice the largest of the other.
TIMES = 4.0


def widened(value: Any) -> Any:
    """The same in float64: tensors, and modules as copies, also within lists and mappings; the rest as it is."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: widened(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [widened(inner) for inner in value]
    return value


def apart(actual: Any, expected: Any) -> float:
    """The largest difference of two results, in parts of the largest value of `expected`.

    A result is a number, a tensor, or a list or mapping of them; as such it has one largest value.
    """
    pairs = [
        (a.detach().double(), b.detach().double()) for a, b in zip(_tensors(actual), _tensors(expected), strict=True)
    ]
    for a, b in pairs:
        assert a.shape == b.shape, f"{tuple(a.shape)} is compared with {tuple(b.shape)}"
    largest = max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0)
    difference = max((float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs if a.numel()), default=0.0)
    return difference / largest if difference else 0.0


def own_error(compute: Callable[..., Any], *given: Any) -> float:
    """How far rounding moves the result of `compute(*given)`: `apart` from the same in float64."""
    return apart(compute(*given), compute(*map(widened, given)))


def assert_near(actual: Any, expected: Any, error: float, times: float = TIMES) -> None:
    """The two are no further `apart` than `times` an error that the reference makes itself (`own_error`).

    Nothing is known better than the distance of neighbouring numbers, so that an error of zero by chance allows that much;
    in fp32, where tiny models come near it by luck, four times that much: a result is made of many roundings.
    """
    spacing = max(torch.finfo(t.dtype).eps for t in _tensors(actual))
    spacing *= 4 if spacing < 1e-6 else 1
    found, own = apart(actual, expected), max(error, spacing)
    assert found <= times * own, f"{found:.3g} of the largest value apart, and the reference's own error is {own:.3g}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, float):
        yield torch.tensor(value, dtype=torch.float64)
