"""Losses of torch and Liger that can stand in for the chunked one of `loss.py`, and when they can."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4train.errors import ConfigError

FusedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def choose_loss(kind: str, hidden: Tensor, dtype: torch.dtype, wanted: dict[str, bool]) -> FusedLoss | None:
    """The function that `model.loss` stands for; None for the chunked loss.

    Args:
        kind: auto, chunked, torch or liger. auto takes Liger on CUDA if it is installed and can do what is wanted, and
            the chunked loss elsewhere, which was faster than torch's own (benchmarks/README.md, Loss).
        hidden: the hidden states, for their device.
        dtype: of the matrix products.
        wanted: what else the loss must have, by name; see `_CANNOT`.

    Raises:
        ConfigError: the loss that was asked for by name cannot work here.
    """
    if kind == "chunked" or (kind == "auto" and hidden.device.type not in _LIGER_DEVICES):
        return None
    name = "liger" if kind == "auto" else kind
    obstacle = _missing(name, hidden.device.type) or _incapable(name, dtype, wanted)
    if obstacle is None:
        return _LOSSES[name]()
    if kind == "auto":
        return None
    raise ConfigError(f"model.loss is {name}, but {obstacle}: set model.loss to auto or chunked.")


_LIGER_DEVICES = ("cuda",)

# What each cannot do besides a plain cross-entropy. Early releases of Liger apply one token's weight to all.
_CANNOT = {
    "torch": ("a z-loss", "additional token rows"),
    "liger": ("a z-loss", "token weights", "additional token rows"),
}


def _missing(name: str, device: str) -> str | None:
    if name == "torch":
        return None if hasattr(nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} has no such loss"
    if device not in _LIGER_DEVICES:
        return f"it runs on CUDA and this is {device}"
    return None if find_spec("liger_kernel") else "the package liger-kernel is not installed"


def _incapable(name: str, dtype: torch.dtype, wanted: dict[str, bool]) -> str | None:
    if name == "liger" and dtype == torch.float64:
        return "it computes no float64"
    unable = [feature for feature in _CANNOT[name] if wanted.get(feature)]
    return f"it has no {' and no '.join(unable)}, which this run asks for" if unable else None


def _torch_loss() -> FusedLoss:
    """torch's own, in chunks; it recomputes logits in the backward pass and gives losses in the dtype of the products."""
    options = nn.LinearCrossEntropyOptions()

    def losses(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, table, targets, reduction="none", options=options)

    return losses


@lru_cache(maxsize=1)
def _liger_loss() -> FusedLoss:
    """Liger's, in chunks, with the gradient of the head summed in fp32.

    It recomputes logits in the backward pass, and waits for the device to count targets.
    """
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

    def losses(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        # In Liger's order: no bias, no class weights, no ignored id, z-loss, label smoothing, reduction, no cap of logits,
        # no z-loss returned, dtype of sums.
        return function.apply(hidden, table, targets, None, None, -100, 0.0, 0.0, "none", None, False, torch.float32)[0]

    return losses


_LOSSES: dict[str, Callable[[], FusedLoss]] = {"torch": _torch_loss, "liger": _liger_loss}
