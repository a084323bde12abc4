"""The names under which a checkpoint holds tensors: `parameter/NAME`, `buffer/NAME`, by canonical name."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_parameters, persistent_buffers
from m4train.training.quantization import quantization_tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PARAMETER, BUFFER = "parameter/", "buffer/"
OPTIMIZER = "optimizer/"  # KIND/NAME
NATIVE = "native/"  # ENGINE/RANKS/RANK/KIND/NUMBER, as an engine keeps the optimizer
GUARD = "guard/"  # norms of the last gradients, if trainer.skip_outliers is set
SCALE = "loss_scale/"  # of fp16


def buffer_tensors(model: TrainableModel) -> dict[str, Tensor]:
    """The live buffers a checkpoint holds, including the scales of 4-bit weights."""
    buffers = {**persistent_buffers(model), **quantization_tensors(model)}
    return {f"{BUFFER}{name}": buffer for name, buffer in buffers.items()}


def weight_tensors(model: TrainableModel) -> dict[str, Tensor]:
    """The live parameters and buffers of a model that a checkpoint holds."""
    parameters = {f"{PARAMETER}{name}": p.detach() for name, p in canonical_parameters(model).items()}
    return {**parameters, **buffer_tensors(model)}


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, asked of what it can do: importing that class takes most of a second, and few runs shard."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that ranks may share."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that ranks may share; all ranks call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
