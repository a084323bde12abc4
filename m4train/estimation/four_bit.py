"""A stand-in for linear layers in 4 bits that fake tensors can be made of: the same bytes held, and for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m4train.training import quantization

_BLOCK, _OUTER = 64, 256  # values per scale of one byte, and scales per scale of four bytes


class FourBitLinear(nn.Linear):
    """A frozen layer of in x out values: half a byte each with its scales, whole in `compute_dtype` while it is used."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        count = like.in_features * like.out_features
        scales = count // _BLOCK + 4 * count // (_BLOCK * _OUTER)
        self.weight = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.bias = like.bias
        self.compute_dtype = torch.bfloat16

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) -> (..., out) in `compute_dtype`."""
        given, shape = hidden.dtype, (self.out_features, self.in_features)
        out = _Product.apply(hidden.to(self.compute_dtype), self.weight, self.bias, shape)
        return out.to(given)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, packed: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.save_for_backward(packed)
        ctx.shape = shape
        whole = packed.new_empty(shape, dtype=hidden.dtype)
        return torch.nn.functional.linear(hidden, whole, None if bias is None else bias.to(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """(..., out) -> (..., in)."""
        (packed,) = ctx.saved_tensors
        return gradient @ packed.new_empty(ctx.shape, dtype=gradient.dtype), None, None, None


@contextmanager
def standing_in() -> Iterator[None]:
    """Makes quantisation give these layers."""
    real = quantization.four_bit
    quantization.four_bit = lambda layer, _: FourBitLinear(layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        quantization.four_bit = real
