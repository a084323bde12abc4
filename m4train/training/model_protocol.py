"""What training asks of a model. Everything else about it stays unknown here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedOutput


class TrainableModel(Protocol):
    """A `torch.nn.Module` that can be trained.

    `parts()` names its parts and the prefixes of the parameter names in each; the longest prefix decides for a parameter.
    Rows of new tokens that are parameters of their own are the part `new_tokens`.
    `blocks()` lists, per part and in execution order, the modules that are sharded and checkpointed as units.
    `flops(batch)` counts the floating-point operations of one forward pass, per part.
    `attention_kernels(device, dtype)` names, per part that has attention, what computes it there in that dtype.
    """

    training: bool

    def __call__(self, batch: PackedBatch, z_loss: float = 0.0, return_logits: bool = False) -> PackedOutput: ...

    def parts(self) -> dict[str, tuple[str, ...]]: ...

    def blocks(self) -> dict[str, list[nn.Module]]: ...

    def flops(self, batch: PackedBatch) -> dict[str, float]: ...

    def attention_kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, ...]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


class Step(Protocol):
    """What one optimizer step of this rank consumes: its micro-batches, and the state of the plan after it."""

    @property
    def micro_batches(self) -> list[PackedBatch]: ...

    @property
    def state(self) -> dict[str, Any]: ...
