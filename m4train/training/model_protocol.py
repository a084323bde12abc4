"""What training asks of a model. Everything else about it stays unknown here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedOutput


class TrainableModel(Protocol):
    """A `torch.nn.Module` that can be trained: what training asks of it itself, and what of nn.Module training uses.

    The names of parts are those of `m4train.parts`.
    """

    training: bool

    def __call__(self, batch: PackedBatch, z_loss: float = 0.0, return_logits: bool = False) -> PackedOutput:
        """The summed loss of a batch, and the loss of each of its targets (N,)."""
        ...

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Its parts and the prefixes of the parameter names in each; the longest prefix decides for a parameter."""
        ...

    def blocks(self) -> dict[str, list[nn.Module]]:
        """Per part and in execution order, the modules that are sharded and checkpointed as units."""
        ...

    def flops(self, batch: PackedBatch) -> dict[str, float]:
        """The floating-point operations of one forward pass, per part."""
        ...

    def attention_kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
        """Per part that has attention, the names of what computes it there in that dtype."""
        ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def get_submodule(self, target: str) -> Any: ...


class Step(Protocol):
    """What one optimizer step of this rank consumes: its micro-batches, and the state of the plan after it."""

    @property
    def micro_batches(self) -> list[PackedBatch]: ...

    @property
    def state(self) -> dict[str, Any]: ...
