"""Linear layers on the CPU: products by the faster library, and inputs that are recomputed rather than kept.

torch's own products of fp32 matrices reach half of what oneDNN, which torch holds too, does on some processors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiply-adds from which oneDNN is the faster one (measured: 0.9 times as fast at 2^21, 1.1 to 1.9 times at 2^23).
_LEAST = 2**22
# Rows of a product that are computed at once if its left side must be copied: the copy then stays in the cache.
_ROWS = 4096


class Linear(nn.Linear):
    """A `nn.Linear` whose three products (output, and the gradients of input and weight) are taken by the faster library."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def recomputed(x: Tensor, again: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """`x` (...), which `linear` need not keep for the backward pass: `again(*sources)` gives it from what is kept anyway."""
    if x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x._again = _Again(again), tuple(source.detach() for source in sources)
    return x


def flattened(x: Tensor) -> Tensor:
    """(T, heads, size) -> (T, heads * size), which is made again if `x` is."""
    flat = x.flatten(1)
    known = None if torch.compiler.is_compiling() else getattr(x, "_again", None)
    if known is None:
        return flat
    function, sources = known[0].function, known[1]
    return recomputed(flat, lambda *sources: function(*sources).flatten(1), *sources)


class _Again:
    """How a tensor is made again: once for all the layers that it went into.

    It holds none of what that takes: what autograd saves is let go of in the backward pass, but this lives as long as the graph,
    which a trainer may still hold while the next micro-batch is computed.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.users = function, 0
        self._made: Tensor | None = None
        self._left = 0

    def make(self, *sources: Tensor) -> Tensor:
        """The tensor, for one of its users; after the last of them it is dropped."""
        if self._made is None:
            self._made, self._left = self.function(*sources), self.users
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._made = None
        return made


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of `x` (..., K), `weight` (N, K) and `bias` (N,): (..., N), equal up to the rounding of sums."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    again: _Again | None
    again, sources = getattr(x, "_again", (None, (x,)))
    if again is None and not _suits(x, weight, x.numel() * weight.shape[0]):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, again, sources)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(M, K) @ (K, N) -> (M, N), without gradient."""
    if not _suits(left, right, left.numel() * right.shape[1]):
        return left @ right
    return _onednn(left, right.t())


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total` (M, N) += `left` (M, K) @ `right` (K, N), without gradient."""
    if not _suits(left, right, left.numel() * right.shape[1]):
        total.addmm_(left, right)
        return
    for part, rows in zip(total.split(_ROWS), left.split(_ROWS)):
        part += _onednn(rows, right.t())


def _suits(left: Tensor, right: Tensor, multiply_adds: int) -> bool:
    return (
        multiply_adds >= _LEAST
        and left.is_cpu
        and left.dtype == right.dtype == torch.float32
        and torch.backends.mkldnn.enabled
        and onednn_is_faster()
    )


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's: there, MKL uses AVX2 alone."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkl.is_available():
        return False
    described = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not described.exists():
        return False
    return "GenuineIntel" not in described.read_text()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K), (N, K) in any strides, (N,) -> (..., N)."""
    # Copied here, not in the operator, so that an estimate of memory sees it.
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, again: _Again | None, sources: tuple[Tensor, ...]
    ) -> Tensor:
        """(..., K), (N, K), (N,) -> (..., N); `sources` are kept: `x`, or what `again` makes it of."""
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        kept = sources if wants_weight else ()
        ctx.again = again
        if again is not None and wants_weight:
            again.users += 1
        ctx.save_for_backward(weight if wants_x else None, *kept)
        return _onednn(x, weight, bias) if _suits(x, weight, x.numel() * weight.shape[0]) else F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` (..., K), `weight` (N, K) and `bias` (N,) from that of the output (..., N)."""
        weight, *kept = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        of_x = of_weight = of_bias = None
        if kept:
            x = ctx.again.make(*kept) if ctx.again else kept[0]
            of_weight = product(flat.t(), x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        if weight is not None:
            of_x = product(flat, weight).unflatten(0, gradient.shape[:-1])
        return of_x, of_weight, of_bias, None, None
