"""FSDP2 itself over fake tensors, among ranks that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import OffloadPolicy

from m4train.config import Config
from m4train.estimation.engines import FakeSingle
from m4train.training.engines.fsdp import FSDPEngine
from m4train.training.engines.single import SingleEngine
from m4train.training.engines.units import sharded_units
from m4train.training.model_protocol import TrainableModel


class FakeSharded(FakeSingle, FSDPEngine):
    """The first rank of a group. What engine.offload moves to CPU memory stays where it is, and is told by its kind."""

    def __init__(self, config: Config, group: dist.ProcessGroup) -> None:
        SingleEngine.__init__(self, config, "cpu")
        self.world_size = group.size()
        self._mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",))
        self._policy = OffloadPolicy()

    def place(self, model: TrainableModel) -> None:
        whole = {parameter for parameter in model.parameters() if parameter.dtype == torch.uint8}  # in 4 bits
        for module in sharded_units(model, model.blocks()):
            self._shard(module, whole)
        self.model = model


@contextmanager
def fake_group(ranks: int) -> Iterator[dist.ProcessGroup]:
    """A group of `ranks` ranks, of which this process is the first, whose collectives move nothing.

    If this process is in a real group, all ranks of that have to make it together, and `ranks` are the first of them.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        yield dist.new_group(list(range(ranks)), backend="fake")  # goes with the real one
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    assert dist.group.WORLD is not None
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
