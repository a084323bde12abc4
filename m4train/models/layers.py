"""Small modules the models share: RMSNorm, rotary embedding, gated MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m4train.errors import ConfigError
from m4train.models.products import Linear, recomputed

Activation = str | Callable[[Tensor], Tensor]  # of hidden_act: a name, or the function itself

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """The elementwise function (...) -> (...) of that name, or the one given.

    Raises ConfigError for a name that no function has.
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r} is not implemented: choose one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the mean square in fp32.

    `weight_first` True multiplies by the weight in fp32 before rounding to its half-precision dtype (Idefics);
    False rounds to the dtype of x first (Idefics2, Llama).
    """

    def __init__(self, size: int, eps: float, weight_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.weight_first = weight_first

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        if x.is_cuda and x.dtype == self.weight.dtype:
            # One kernel, which keeps none of the fp32 values below for the backward pass; it rounds once, at the end.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and not torch.compiler.is_compiling():
            with torch.no_grad():
                inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            return recomputed(_RMSNorm.apply(x, inverse, self.weight), _rms_norm, x, inverse, self.weight)
        wide = x.double() if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if not self.weight_first:
            return self.weight * normed.to(x.dtype)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight * (normed.to(self.weight.dtype) if half else normed)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def _rms_norm(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """(..., size), (..., 1) one over the root of the mean square, (size,) -> (..., size)."""
    return (x * inverse).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    """Keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        """(..., size), (..., 1), (size,) -> (..., size)."""
        ctx.save_for_backward(x, inverse, weight)
        return _rms_norm(x, inverse, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of `x` (..., size) and of the weight (size,) from that of the output (..., size)."""
        x, inverse, weight = ctx.saved_tensors
        normed = x * inverse
        of_x = of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = (gradient * normed).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            of_normed = gradient * weight
            along = (of_normed * normed).mean(-1, keepdim=True)
            of_x = of_normed.sub_(normed.mul_(along)).mul_(inverse)
        return of_x, None, of_weight


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), without biases."""

    def __init__(self, size: int, inner: int, out: int | None = None, act: Activation = "silu") -> None:
        super().__init__()
        self.act = activation(act)
        self.gate_proj = Linear(size, inner, bias=False)
        self.up_proj = Linear(size, inner, bias=False)
        self.down_proj = Linear(inner, size if out is None else out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., out)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not gate.is_cpu or torch.compiler.is_compiling():
            return self.down_proj(self.act(gate) * up)
        gated = _Gated.apply(gate, up, self.act)
        return self.down_proj(recomputed(gated, partial(_gated, act=self.act), gate, up))


def _gated(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return act(gate) * up


class _Gated(torch.autograd.Function):
    """act(gate) * up, which keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """(..., size) twice -> (..., size)."""
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _gated(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of both (..., size) from that of the output (..., size)."""
        gate, up = ctx.saved_tensors
        # Not by autograd.grad, whose first call imports torch's compiler, a part of a second.
        if ctx.act is F.silu:
            return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate), None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            acted = ctx.act(gate)
        [of_gate] = torch.autograd.grad(acted, gate, gradient * up)
        return of_gate, gradient * acted.detach(), None


class Rotary:
    """Rotary position embedding, halves rotated (Llama), with the `llama3` and `linear` scalings.

    Not a module: it holds no parameter, and its frequencies stay fp32 whatever dtype the model is cast to.
    """

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None = None) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        self._frequencies = {torch.device("cpu"): _scaled(1.0 / theta**exponents, scaling)}

    def tables(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `position_ids` (T,): two tensors (T, 1, head_dim) fp32."""
        device = position_ids.device
        if device not in self._frequencies:
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        angles = position_ids.float()[:, None] * self._frequencies[device]
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates (T, heads, head_dim) by the tables of `Rotary`, in fp32 inside."""
    cos, sin = tables
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def _scaled(frequencies: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    kind = (scaling or {}).get("rope_type", "default")
    if scaling is None or kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise ConfigError(f"rope_scaling has rope_type {kind!r}, but default, linear and llama3 are implemented: change it")


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / factor, between)
    return torch.where(wavelengths < context / high, frequencies, scaled)


def stretch_positions(positions: Tensor, grid: int, scale: tuple[float, float]) -> Tensor:
    """Position vectors (grid * grid, C) on another grid, (rows * columns, C): bicubic, in fp32 or wider.

    `scale` is the new side over the old one, rows and columns; the new sides are its product with `grid`, rounded down.
    """
    wide = positions if positions.dtype == torch.float64 else positions.float()
    square = wide.unflatten(0, (grid, grid)).permute(2, 0, 1)[None]
    stretched = F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False)
    return stretched[0].flatten(1).t().to(positions.dtype)
