"""Data parallel: a whole model on every rank, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from m4train.batch import PackedBatch, PackedOutput
from m4train.training.engines.distributed import DistributedEngine
from m4train.training.model_protocol import TrainableModel

# torch 2.13 renamed the option; buffers are constants here, equal on every rank.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DDPEngine(DistributedEngine):
    """Every rank holds everything; the gradients of the last micro-batch of a step carry the reduction."""

    def prepare(self, model: TrainableModel) -> None:
        super().prepare(model)
        self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})

    def forward(self, batch: PackedBatch, z_loss: float = 0.0) -> PackedOutput:
        """See `Engine.forward`: loss (), token losses (L,)."""
        self.depart()
        module = self._wrapped if torch.is_grad_enabled() else self.model
        with self.autocast():
            return module(batch, z_loss=z_loss)

    def accumulation(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped.no_sync()
