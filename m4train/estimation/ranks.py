"""Memory of one rank: what the whole step needs on one process, shared out as the engine does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from m4train.config import Config
from m4train.estimation.step import BatchShape, StepMemory, fake_model, step_memory, worst_case
from m4train.training.engines.units import sharded_units
from m4train.training.naming import canonical_parameters
from m4train.training.precision import half_of
from m4train.training.throughput import pass_factors

_BUCKET = 50_000_000 * 4.0  # bytes of a bucket that DeepSpeed reduces or gathers at once, as m4train configures it
_GIB = 2.0**30


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by component, at the moment of the peak; `host` is what engine.offload keeps in CPU memory.

    `expected` adds what the device's library and allocator take: `low` and `high` say how little and how much that may be.
    """

    components: dict[str, float]
    host: float = 0.0
    on_gpu: bool = False

    @property
    def tensors(self) -> float:
        return sum(self.components.values())

    @property
    def low(self) -> float:
        return self.tensors + 0.5 * _GIB * self.on_gpu

    @property
    def expected(self) -> float:
        return self.tensors * (1.03 if self.on_gpu else 1.0) + 1.0 * _GIB * self.on_gpu

    @property
    def high(self) -> float:
        return self.tensors * (1.1 if self.on_gpu else 1.05) + 2.0 * _GIB * self.on_gpu


@dataclass(frozen=True)
class Sizes:
    """What of a model is stored and how large: bytes of what trains and what does not, of the optimizer's state, of the two
    largest units that sharding gathers and of what is gathered for as long as a step lasts."""

    parameters: int
    trained: int
    trained_bytes: float
    frozen_bytes: float
    whole_bytes: float  # frozen weights in 4 bits, which every rank holds whole
    largest_unit: float
    root_unit: float
    flops: dict[str, float] = field(default_factory=dict)  # forward passes of one worst micro-batch, by part
    factors: dict[str, float] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()  # parts whose blocks are computed again under gradient checkpointing


def sizes(config: Config, architecture: Any, shape: BatchShape, stored: torch.dtype | None) -> Sizes:
    """The sizes of the model of `config`, of which nothing is made."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config, architecture, stored)
        own = canonical_parameters(model)
        trained = [p for p in own.values() if p.requires_grad]
        frozen = [p for p in own.values() if not p.requires_grad]
        half = half_of(config.trainer.precision)
        width = 4.0 if half is None else 2.0
        packed = [p for p in frozen if p.dtype == torch.uint8]
        units = _unit_sizes(model, width)
        batch = worst_case(architecture, shape)
        return Sizes(
            parameters=sum(p.numel() for p in own.values()) + sum(p.numel() for p in packed),
            trained=sum(p.numel() for p in trained),
            trained_bytes=sum(4.0 * p.numel() for p in trained),
            frozen_bytes=sum(float(p.numel() * p.element_size()) for p in frozen if p.dtype != torch.uint8),
            whole_bytes=float(sum(p.numel() for p in packed)),
            largest_unit=max(units[:-1], default=0.0),
            root_unit=units[-1],
            flops=model.flops(batch),
            factors=pass_factors(model),
            blocks=tuple(model.blocks()),
        )


def _unit_sizes(model: Any, width: float) -> list[float]:
    """Bytes of each unit that is gathered as one, the root last: of towers and root what no unit inside them holds."""
    taken: set[int] = set()
    found = []
    for unit in sharded_units(model, model.blocks()):
        own = [p for p in unit.parameters() if id(p) not in taken and p.dtype != torch.uint8]
        taken.update(id(p) for p in own)
        found.append(sum(p.numel() for p in own) * width)
    return found


def rank_memory(
    config: Config, architecture: Any, shape: BatchShape, ranks: int, stored: torch.dtype | None, device: str
) -> RankMemory:
    """Memory of one of `ranks` ranks under the engine of `config`."""
    engine, on_gpu = config.engine, device == "cuda"
    step = step_memory(config, architecture, shape, device, stored, half=_computed_in_half(config))
    if engine.name == "single" or (ranks == 1 and not engine.offload):
        return RankMemory(_alone(step), on_gpu=on_gpu)
    size = sizes(config, architecture, shape, stored)
    if engine.name == "ddp":
        whole = {**_alone(step), "gradients": size.trained_bytes, "activations": step.working}
        return RankMemory({k: v for k, v in whole.items() if k != "operations"}, on_gpu=on_gpu)
    return _sharded(config, step, size, ranks, on_gpu)


def _alone(step: StepMemory) -> dict[str, float]:
    return {
        "parameters": step.parameters + step.buffers,
        "gradients": step.gradients,
        "optimizer": step.optimizer,
        "activations": step.activations + step.batch,
        "operations": step.passing,
    }


def _computed_in_half(config: Config) -> bool:
    """Whether weights are cast as they are gathered, so that autocast keeps no copies of them."""
    return config.engine.name in ("fsdp2", "zero3") and half_of(config.trainer.precision) is not None


def _sharded(config: Config, step: StepMemory, size: Sizes, ranks: int, on_gpu: bool) -> RankMemory:
    name, shares = config.engine.name, float(ranks)
    stored = size.trained_bytes + size.frozen_bytes
    components = {"activations": step.working + step.batch}
    if name in ("zero1", "zero2"):
        components["parameters"] = stored + size.whole_bytes
        components["gradients"] = size.trained_bytes / (1.0 if name == "zero1" else shares)
        components["optimizer"] = (
            step.optimizer + size.trained_bytes
        ) / shares  # moments, and the flat copy they belong to
        components["buckets"] = 2 * min(_BUCKET, size.trained_bytes)
    else:
        components["parameters"] = stored / shares + size.whole_bytes
        components["gradients"] = size.trained_bytes / shares
        components["optimizer"] = step.optimizer / shares
        components["gathered"] = size.root_unit + 2 * size.largest_unit
        components["buckets"] = 2 * _BUCKET if name == "zero3" else 2 * size.largest_unit
    host = 0.0
    if config.engine.offload:
        moved = ("optimizer", "gradients", *(("parameters",) if name in ("fsdp2", "zero3") else ()))
        host = sum(components.pop(part) for part in moved)
    return RankMemory(components, host, on_gpu)
