"""Fully sharded data parallel (FSDP2): parameters, gradients and optimizer state split over ranks."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from m4train.config import Config, optimizer_kind
from m4train.errors import ConfigError
from m4train.training import optim
from m4train.training.engines.base import Update
from m4train.training.engines.distributed import DistributedEngine
from m4train.training.engines.units import sharded_units
from m4train.training.gradient_checkpointing import checkpoint_blocks
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_parameters
from m4train.training.precision import half_of
from m4train.training.quantization import is_quantized


class FSDPEngine(DistributedEngine):
    """Stored in fp32 when it trains, gathered and computed in the run's precision, reduced in fp32.

    The optimizer works on each rank's own shards as plain tensors, so that any element-wise optimizer can be used; Muon,
    which is not element-wise, is given the distributed tensors and puts its matrices together.
    """

    sharded = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._mesh = self._make_mesh()
        offload = config.engine.offload
        self._policy: OffloadPolicy = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        )

    def _make_mesh(self) -> DeviceMesh:
        if not self.config.engine.shard_within_node:
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        per_node = self.processes.local_world_size
        if self.world_size % per_node:
            raise ConfigError(
                f"engine.shard_within_node needs equally many ranks on every node, but {self.world_size} ranks "
                f"are not a multiple of the {per_node} of this node."
            )
        return init_device_mesh(
            self.device.type, (self.world_size // per_node, per_node), mesh_dim_names=("replicate", "shard")
        )

    def prepare(self, model: TrainableModel) -> None:
        """Shards block by block, then each tower that holds blocks, then what is left."""
        self.store(model)
        if self.config.trainer.gradient_checkpointing:
            checkpoint_blocks(model.blocks())
        self.place(model)
        self._sharded = {n: p for n, p in canonical_parameters(model).items() if p.requires_grad}
        local = {name: nn.Parameter(p.to_local()) for name, p in self._sharded.items()}
        self.optimise(local, self._sharded if optimizer_kind(self.config.optimizer.name).whole_matrices else None)

    def place(self, model: TrainableModel) -> None:
        # Packed 4-bit weights would lose their scales in shards: they stay whole on every rank, at half a byte a value.
        packed = [module.to(self.device) for module in model.modules() if is_quantized(module)]
        whole = {cast(nn.Parameter, module.weight) for module in packed}
        for module in sharded_units(model, model.blocks()):
            self._shard(module, whole)
        self.model = model

    def _shard(self, module: nn.Module, whole: set[nn.Parameter]) -> None:
        half = half_of(self.config.trainer.precision)
        precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(
            module, mesh=self._mesh, mp_policy=precision, offload_policy=self._policy, ignored_params=whole or None
        )

    def update(self, factor: float, max_norm: float) -> Update:
        for name, sharded in self._sharded.items():
            local = self.trainable[name]
            local.data = sharded.to_local()
            local.grad = None if sharded.grad is None else sharded.grad.to_local()
        result = super().update(factor, max_norm)
        for sharded in self._sharded.values():
            sharded.grad = None
        return result

    def sum_squares(self, squares: Tensor) -> Tensor:
        """Sum over ranks of squared norms per part (P,)."""
        dist.all_reduce(squares, group=self._mesh.get_group("shard"))
        return squares

    def without_gradient(self) -> list[str]:
        return [name for name, parameter in self._sharded.items() if parameter.grad is None]

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        for key, value in optim.optimizer_tensors(self.optimizer).items():
            parameter = self._sharded[key.split("/", 2)[2]]
            if isinstance(value, DTensor):
                continue
            if value.shape == parameter.to_local().shape and value.ndim:
                tensors[key] = _as_dtensor(value, parameter)
        return tensors


def _as_dtensor(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
