"""Data parallel: a whole model on every rank, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m4train.batch import PackedBatch, PackedOutput
from m4train.config import Config
from m4train.training.engines.processes import Processes
from m4train.training.engines.single import SingleEngine
from m4train.training.heartbeat import PATIENCE

# torch 2.13 renamed the option; buffers are constants here, equal on every rank.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
_FOREVER = 7 * 24 * 3600.0


class DistributedEngine(SingleEngine):
    """What engines of several processes share: agreement, reduction, and a loss scaled against averaged gradients."""

    def __init__(self, config: Config) -> None:
        # The heartbeat, which can name the stage and the samples, speaks before a collective gives up.
        seconds = 2 * PATIENCE * config.trainer.hang_timeout or _FOREVER
        self.processes = Processes(timedelta(seconds=seconds))
        super().__init__(config, self.processes.device)
        self.rank, self.world_size = self.processes.rank, self.processes.world_size
        self.control_group, self.checkpoint_group = self.processes.control_group, self.processes.checkpoint_group

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.world_size).backward()

    def reduce(self, values: Tensor) -> Tensor:
        return self.processes.reduce(values)

    def agree(self, values: Sequence[int]) -> list[int]:
        return self.processes.agree(values)

    def broadcast(self, value: Any) -> Any:
        return self.processes.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        return self.processes.gather(value)

    def barrier(self) -> None:
        self.processes.barrier()

    def shutdown(self) -> None:
        self.processes.shutdown()


class DDPEngine(DistributedEngine):
    """Every rank holds everything; the gradients of the last micro-batch of a step carry the reduction."""

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})

    def forward(self, batch: PackedBatch, z_loss: float = 0.0) -> PackedOutput:
        module = self._wrapped if torch.is_grad_enabled() else self.model
        with self.autocast():
            return module(batch, z_loss=z_loss)

    def accumulation(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped.no_sync()
