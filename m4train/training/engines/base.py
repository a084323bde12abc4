"""What the trainer asks of an engine; single process, DDP, FSDP2 and DeepSpeed all answer to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from m4train.batch import PackedBatch, PackedOutput
from m4train.errors import M4Error
from m4train.training.model_protocol import TrainableModel

_Decision = TypeVar("_Decision")


@dataclass(frozen=True)
class Update:
    """What an update did, on the device: gradient norms before clipping, `total` () and `by_part` (P,) in the order of
    `parts`, and `skipped` (), 1.0 if nothing was changed because the norm was not finite. The same on every rank."""

    total: Tensor
    by_part: Tensor
    parts: tuple[str, ...]
    skipped: Tensor
    loss_scale: Tensor | None = None  # () what the losses were multiplied by; None: nothing, as under bf16 and fp32


class Engine(Protocol):
    """How a model is placed, run and updated on this many processes.

    The order of a step: per micro-batch `forward` and `backward`, then `update`.
    """

    rank: int
    world_size: int
    device: torch.device
    checkpoint_group: Any  # process group for a thread that writes a checkpoint meanwhile; None with one process

    @property
    def sharded(self) -> bool:
        """Whether ranks share the weights, so that all must make the same forward passes."""
        ...

    def prepare(self, model: TrainableModel) -> None:
        """Places and wraps the model, and builds the optimizer. Freezing and adapters are already applied."""
        ...

    def place(self, model: TrainableModel) -> None:
        """Places and wraps a model that only evaluates: no optimizer, no gradients."""
        ...

    def forward(self, batch: PackedBatch, z_loss: float = 0.0) -> PackedOutput:
        """The model on one micro-batch that is on `device`, in the run's precision: loss (), token losses (L,)."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of `loss` (), whose sum over ranks and micro-batches is the objective.

        `last` marks the last micro-batch of the step, where gradients are reduced over ranks.
        """
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """The run's precision, for calls of the model that `forward` does not make."""
        ...

    def accumulation(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch."""
        ...

    def update(self, factor: float, max_norm: float) -> Update:
        """Clips the gradients to a global norm of `max_norm`, makes one optimizer update at `factor` times the peak rates,
        and drops the gradients. If the norm is not finite, every rank leaves parameters and optimizer as they were."""
        ...

    def without_gradient(self) -> list[str]:
        """Canonical names of the trainable parameters that have no gradient (not: a gradient of zero)."""
        ...

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks of a tensor (...) on `device`, of the same shape."""
        ...

    def agree(self, values: Sequence[int]) -> list[int]:
        """Sums over ranks of small host integers, without waiting for the device."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value of a small picklable object."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The picklable objects of all ranks in their order, on rank 0; an empty list on the others."""
        ...

    def barrier(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """What a portable checkpoint holds: `parameter/NAME`, `buffer/NAME` and `optimizer/KIND/NAME`.

        Live tensors as they are, or, if an engine keeps them in a form of its own, copies gathered on rank 0.
        """
        ...

    def live_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter as this rank computes with it, whole, by canonical name, one at a time; all ranks call it."""
        ...

    def staged(self) -> dict[str, Tensor]:
        """The same as copies in CPU memory, which stay as they are while training goes on, until it is called again."""
        ...

    @property
    def native_prefix(self) -> str | None:
        """How the names of tensors begin that this engine keeps in a form of its own, on this number of ranks; None: none."""
        ...

    def load(self, read: Callable[[dict[str, Tensor]], None], native: bool = False) -> None:
        """Overwrites parameters and optimizer; `read` fills the tensors it is given from a checkpoint, by name. What it
        leaves out of the optimizer stays as it begins: zero. `native`: the optimizer is stored under `native_prefix`."""
        ...

    def shutdown(self) -> None:
        """Ends the process group, in order."""
        ...


def agreed(engine: Engine, decide: Callable[[], _Decision]) -> _Decision:
    """What `decide` says on rank 0, on every rank; what it raises there, it raises on every rank."""
    found: Any = None
    if engine.rank == 0:
        try:
            found = decide()
        except M4Error as error:
            found = error
    found = engine.broadcast(found)
    if isinstance(found, M4Error):
        raise found
    return found
