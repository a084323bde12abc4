"""What the trainer asks of an engine; single process, DDP, FSDP2 and DeepSpeed all answer to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedOutput


@dataclass(frozen=True)
class GradientNorms:
    """Norms before clipping, on the device: `total` (), and `by_part` (P,) in the order of `parts`."""

    total: Tensor
    by_part: Tensor
    parts: tuple[str, ...]


class Engine(Protocol):
    """How a model is placed, run and updated on this many processes.

    The order of a step: `start_step`, then per micro-batch `forward` and `backward`, then `clip`, `step`.
    """

    rank: int
    world_size: int
    device: torch.device
    control_group: Any  # process group for host-side agreement; None with one process

    def prepare(self, model: nn.Module) -> None:
        """Places and wraps the model, and builds the optimizer. Freezing and adapters are already applied."""
        ...

    def forward(self, batch: PackedBatch, z_loss: float = 0.0) -> PackedOutput:
        """The model on one micro-batch that lies on `device`, in the run's precision."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss`, whose sum over ranks and micro-batches is the objective.

        `last` marks the last micro-batch of the step, where gradients are reduced over ranks.
        """
        ...

    def accumulation(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch."""
        ...

    def clip(self, max_norm: float) -> GradientNorms:
        """Scales the gradients to a global norm of at most `max_norm` and returns the norms before that."""
        ...

    def step(self, factor: float, skip: Tensor) -> None:
        """One optimizer update at `factor` times the peak rates, or none where `skip` () is 1.0; drops the gradients."""
        ...

    def without_gradient(self) -> list[str]:
        """Canonical names of the trainable parameters that have no gradient (not: a gradient of zero)."""
        ...

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks of a tensor on `device`."""
        ...

    def agree(self, values: Sequence[int]) -> list[int]:
        """Sums over ranks of small host integers, without waiting for the device."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value of a small picklable object."""
        ...

    def barrier(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors of a portable checkpoint: `parameter/NAME`, `buffer/NAME` and `optimizer/KIND/NAME`, as placed."""
        ...

    def loaded(self) -> None:
        """Called once the tensors were overwritten from a checkpoint."""
        ...

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter unsharded, on the CPU of rank 0, one at a time; other ranks take part and get empty tensors."""
        ...

    def shutdown(self) -> None:
        """Ends the process group, in order."""
        ...
