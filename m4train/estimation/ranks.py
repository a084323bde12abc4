"""Memory of one rank: what the whole step needs on one process, shared out as the engine does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from m4train.config import Config
from m4train.config.deepspeed import deepspeed_config
from m4train.estimation.engines import FakeSingle
from m4train.estimation.step import BatchShape, StepMemory, fake_model, step_memory, worst_case
from m4train.training.engines.units import sharded_units
from m4train.training.naming import canonical_parameters, part_of
from m4train.training.precision import half_of
from m4train.training.throughput import pass_factors

PER_NODE = 8  # ranks, for engine.shard_within_node
_GIB = 2.0**30


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by component, at the moment of the peak; `host` is what engine.offload keeps in CPU memory.

    `expected` adds what the device's library and allocator take: `low` and `high` say how little and how much that may be.
    `measured` is what an allocator took of a byte that was expected of a run, from a calibration.
    """

    components: dict[str, float]
    host: float = 0.0
    on_gpu: bool = False
    measured: float | None = None

    @property
    def tensors(self) -> float:
        return sum(self.components.values())

    @property
    def low(self) -> float:
        return self.tensors * (self.measured or 1.0) + 0.5 * _GIB * self.on_gpu

    @property
    def expected(self) -> float:
        if self.measured is not None:
            return self.low
        return self.tensors * (1.03 if self.on_gpu else 1.0) + 1.0 * _GIB * self.on_gpu

    @property
    def high(self) -> float:
        if self.measured is not None:
            return 1.05 * self.tensors * self.measured + 1.0 * _GIB * self.on_gpu
        return self.tensors * (1.1 if self.on_gpu else 1.05) + 2.0 * _GIB * self.on_gpu


@dataclass(frozen=True)
class Sizes:
    """What of a model is stored and how large, in bytes unless it says otherwise."""

    parameters: int
    trained: int
    trained_bytes: float
    frozen_bytes: float
    whole_bytes: float  # frozen weights in 4 bits, which every rank holds whole
    largest_unit: int  # elements of the largest unit that sharding gathers as one, the root apart
    revisited: int  # elements of what the backward pass needs again
    whole_weights: float  # all weights as they are computed in, which ranks would hold if they gave nothing away again
    checkpoint_bytes: float  # all weights and the state of the optimizer
    flops: dict[str, float] = field(default_factory=dict)  # forward passes of one worst micro-batch, by part
    factors: dict[str, float] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()  # parts whose blocks are computed again under gradient checkpointing


def sizes(config: Config, architecture: Any, shape: BatchShape, stored: torch.dtype | None) -> Sizes:
    """The sizes of the model of `config`, of which nothing is made."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, engine = fake_model(config, architecture, stored), FakeSingle(config, "cpu")
        engine.prepare(model)
        own = canonical_parameters(model)
        trained = [p for p in own.values() if p.requires_grad]
        frozen = [p for p in own.values() if not p.requires_grad]
        half = half_of(config.trainer.precision)
        width = 4.0 if half is None else 2.0
        packed = [p for p in frozen if p.dtype == torch.uint8]
        units = _unit_counts(model)
        batch, factors, parts = worst_case(architecture, shape), pass_factors(model), model.parts()
        again = (p for name, p in own.items() if p.requires_grad or factors.get(part_of(name, parts), 1.0) > 1.0)
        return Sizes(
            parameters=sum(p.numel() for p in own.values()) + sum(p.numel() for p in packed),
            trained=sum(p.numel() for p in trained),
            trained_bytes=sum(4.0 * p.numel() for p in trained),
            frozen_bytes=sum(float(p.numel() * p.element_size()) for p in frozen if p.dtype != torch.uint8),
            whole_bytes=float(sum(p.numel() for p in packed)),
            largest_unit=max(units[:-1], default=0),
            whole_weights=width * sum(units),
            checkpoint_bytes=float(sum(t.numel() * t.element_size() for t in engine.tensors().values())),
            flops=model.flops(batch),
            revisited=sum(p.numel() for p in again if p.dtype != torch.uint8),
            factors=factors,
            blocks=tuple(model.blocks()),
        )


def _unit_counts(model: Any) -> list[int]:
    """Elements of each unit that is gathered as one, the root last: of towers and root what no unit inside them holds."""
    taken: set[int] = set()
    found = []
    for unit in sharded_units(model, model.blocks()):
        own = [p for p in unit.parameters() if id(p) not in taken and p.dtype != torch.uint8]
        taken.update(id(p) for p in own)
        found.append(sum(p.numel() for p in own))
    return found


def rank_memory(
    config: Config, architecture: Any, shape: BatchShape, ranks: int, stored: torch.dtype | None, device: str
) -> RankMemory:
    """Memory of one of `ranks` ranks under the engine of `config`; all ranks of a group call it, as `step_memory` says."""
    engine, trainer, on_gpu = config.engine.name, config.trainer, device == "cuda"
    passes = 1 if trainer.global_batch_size <= trainer.micro_batch_size * ranks else 2
    shards = {"fsdp2": _shards(config, ranks), "zero1": ranks, "zero2": ranks}.get(engine)
    step = step_memory(config, architecture, shape, device, stored, passes, shards)
    if engine == "ddp":
        found = _ddp(step, sizes(config, architecture, shape, stored), passes)
    elif engine == "zero3":
        settings = deepspeed_config(config, ranks)["zero_optimization"]
        found = _zero3(step, sizes(config, architecture, shape, stored), ranks, settings)
    else:
        found = _whole(step)
    return _offloaded(config, found, on_gpu)


def accompany(config: Config, ranks: int) -> None:
    """What the other ranks of a group do while the first one estimates."""
    if config.engine.name == "fsdp2":
        from m4train.estimation.sharded import fake_group

        with fake_group(_shards(config, ranks)):
            pass


def _shards(config: Config, ranks: int) -> int:
    return min(ranks, PER_NODE) if config.engine.shard_within_node else ranks


def _always(step: StepMemory) -> dict[str, float]:
    """What every engine holds in the same way."""
    return {"buffers": step.buffers, "frames": step.batch}


def _whole(step: StepMemory) -> dict[str, float]:
    """What the engine itself held at the peak."""
    return {
        **_always(step),
        "parameters": step.parameters,
        "gradients": step.gradients,
        "optimizer": step.optimizer,
        "activations": step.activations,
        "operations": step.passing,
        "gathered": step.gathered,
        "buckets": step.buckets,
        "master copy": step.master,
        "offloaded": step.offloaded,
    }


def _ddp(step: StepMemory, size: Sizes, passes: int) -> dict[str, float]:
    """Gradients lie in DDP's buckets, which are there all the time; those of earlier micro-batches are summed elsewhere, until
    those of the last one are there."""
    return {
        **_always(step),
        "parameters": step.parameters,
        "gradients": size.trained_bytes * min(passes, 2),
        "optimizer": step.optimizer,
        "activations": step.working,
    }


def _zero3(step: StepMemory, size: Sizes, ranks: int, settings: dict[str, Any]) -> dict[str, float]:
    """What DeepSpeed, set up so, keeps of it on one rank: next to the moments a flat copy of what trains, which they belong to.

    It keeps whole, in elements: what it needs again within a distance, half of it forwards, and what it gathers in advance.
    """
    stored, shares = size.trained_bytes + size.frozen_bytes, float(ranks)
    live = settings["stage3_max_reuse_distance"] / 2 + settings["stage3_prefetch_bucket_size"]
    live = min(live, settings["stage3_max_live_parameters"])
    whole = min(float(size.revisited), live) + size.largest_unit
    return {
        **_always(step),
        "activations": step.working,
        "parameters": stored / shares + size.whole_bytes,
        "gradients": size.trained_bytes / shares,
        "optimizer": step.optimizer / shares,
        "master copy": size.trained_bytes / shares,
        "gathered": min(whole * stored / size.parameters, stored),
        "buckets": 4.0 * settings["reduce_bucket_size"],
    }


# What engine.offload keeps on the host; under zero1 and zero2, gradients are on the device until they are reduced.
_ON_HOST = {
    "zero1": ("optimizer", "master copy", "offloaded"),
    "zero2": ("optimizer", "master copy", "offloaded"),
    "zero3": ("optimizer", "master copy", "gradients", "parameters"),
    "fsdp2": ("optimizer", "gradients", "parameters"),
}


def _offloaded(config: Config, components: dict[str, float], on_gpu: bool) -> RankMemory:
    moved = _ON_HOST.get(config.engine.name, ()) if config.engine.offload else ()
    host = sum(components.pop(part, 0.0) for part in moved)
    return RankMemory({name: value for name, value in components.items() if name != "offloaded"}, host, on_gpu)
