"""One training step of the real model under fake tensors: every allocation is counted, none is made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from m4train.batch import CrossSegments, PackedBatch, PackedImages, Segments
from m4train.config import Config
from m4train.estimation.engines import FakeSingle, staying
from m4train.estimation.four_bit import standing_in
from m4train.estimation.tracker import MemoryTracker
from m4train.estimation.zero import FakeZero
from m4train.families import FAMILIES
from m4train.models import loss
from m4train.training.equip import equip
from m4train.training.tensors import local

HELD = (
    "parameters",
    "buffers",
    "gradients",
    "optimizer",
    "activations",
    "passing",
    "batch",
    "gathered",
    "buckets",
    "master",
    "offloaded",
)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process at the moment its memory peaks, by what holds them; `activations` is what the forward pass
    makes and leaves, `passing` what comes after it and is neither gradient nor state."""

    parameters: float
    buffers: float
    gradients: float
    optimizer: float
    activations: float
    passing: float
    batch: float
    gathered: float  # under fsdp2: whole weights of blocks that are or were just computed
    buckets: float  # gradients on their way between ranks
    master: float  # under zero1 and zero2: what the optimizer works on
    offloaded: float  # and gradients that are kept on the host
    working: float  # the most that activations and operations hold together, which may be at another moment

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in HELD)


@dataclass(frozen=True)
class BatchShape:
    """What one micro-batch holds at most: `tokens`, and `frames` (images, for packed patches) of `patches` each."""

    tokens: int
    frames: int
    patches: int = 0


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """Chunks of the loss as on a GPU, also where the fake tensors are the CPU's."""
    kept = dict(loss._CHUNK_ELEMENTS)
    if device == "cuda":
        loss._CHUNK_ELEMENTS["cpu"] = kept["cuda"]
    try:
        yield
    finally:
        loss._CHUNK_ELEMENTS.update(kept)


def step_memory(
    config: Config,
    architecture: Any,
    shape: BatchShape,
    device: str = "cpu",
    stored: torch.dtype | None = None,
    passes: int = 1,
    shards: int | None = None,
) -> StepMemory:
    """Memory at the peak of a whole step on one process, with `architecture` (a model's configuration) in full.

    `device` cpu or cuda says whose chunk sizes are used; the tensors are fake ones of the CPU. `stored` is the dtype of the
    weights in their file (None: fp32, as new ones are).
    `passes`: micro-batches; from the second on, gradients are there from the start. `shards`: ranks among which the engine
    splits what it splits (None: it runs as on one process), of which FSDP2 takes the first; if this process is in a group, all
    ranks of it have to call this.
    """
    config = replace(config, trainer=replace(config.trainer, precision=_counted_as(config.trainer.precision)))
    with _engine(config, shards) as engine, FakeTensorMode(allow_non_fake_inputs=True), _chunks_of(device):
        model = fake_model(config, architecture, stored)
        engine.prepare(model)
        return _tracked(config, engine, model, worst_case(architecture, shape), passes)


@contextmanager
def _engine(config: Config, shards: int | None) -> Iterator[FakeSingle]:
    if shards is None:
        yield FakeSingle(config, "cpu")
        return
    if config.engine.name != "fsdp2":
        yield FakeZero(config, shards)
        return
    from m4train.estimation.sharded import FakeSharded, fake_group  # takes most of a second, and few runs shard

    with fake_group(shards) as group:
        yield FakeSharded(config, group)


def _tracked(config: Config, engine: FakeSingle, model: Any, batch: PackedBatch, passes: int) -> StepMemory:
    model.train()
    tracker = MemoryTracker()
    tracker.hold("parameters", map(local, model.parameters()))
    tracker.hold("buffers", model.buffers())
    states = (value for state in engine.optimizer.state.values() for value in state.values())
    tracker.hold("optimizer", (local(value) for value in states if isinstance(value, Tensor)))
    tracker.hold("batch", _tensors(batch))
    others, engine.hold = engine.kinds(), tracker.hold
    for kind, tensors in others.items():
        tracker.hold(kind, tensors)
    tracker.gradients_of(model.parameters())
    with tracker:
        for number in range(passes):
            tracker.phase = "activations"
            output = engine.forward(batch, config.model.z_loss)
            tracker.phase = "passing"
            engine.backward(output.loss, number == passes - 1)
            del output
        engine.update(1.0, config.trainer.max_grad_norm)
    peak = {name: float(tracker.peak.get(name, 0)) for name in HELD}
    return StepMemory(
        **peak,
        working=float(tracker.working),
    )


def _counted_as(precision: str) -> str:
    """bf16 for fp16, which is as wide: autocast of the CPU takes no weights in bf16 next to it."""
    return "bf16" if precision == "fp16" else precision


def fake_model(config: Config, architecture: Any, stored: torch.dtype | None = None) -> Any:
    """The model as training has it, of weights that are `stored` so in their file (None: fp32, as new ones are)."""
    model = FAMILIES[config.model.family].model_class(copy.deepcopy(architecture))
    model.loss_kind = config.model.loss
    if stored is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored)
    with staying(), standing_in():
        equip(model, config, config.freeze.new_rows_from)
    return model


def worst_case(architecture: Any, shape: BatchShape) -> PackedBatch:
    """A micro-batch that fills its budgets with one document and as many images as its tokens have room for."""
    count = shape.tokens
    frames = frames_at_most(architecture, shape)
    ids = torch.zeros(count, dtype=torch.int64)
    cross = positions = None
    vision = architecture.vision_config
    if hasattr(architecture, "cross_layer_interval"):
        cross = CrossSegments.of([count], [list(range(frames))])
    else:
        positions = torch.arange(frames * architecture.tokens_per_image)
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(count),
        segments=Segments.of([count]),
        loss_positions=torch.arange(count - 1),
        targets=ids[1:],
        images=_images(vision, frames, shape.patches),
        image_positions=positions,
        cross=cross,
        target_sources=torch.zeros(count - 1, dtype=torch.int64),
        source_names=("any",),
        capacity=count,
    )


def frames_at_most(architecture: Any, shape: BatchShape) -> int:
    """Frames that a micro-batch can hold: its budget, and no more than its tokens have room for."""
    if hasattr(architecture, "cross_layer_interval"):
        return max(1, shape.frames)
    return max(1, min(shape.frames, shape.tokens // architecture.tokens_per_image))


def _images(vision: Any, frames: int, patches: int) -> PackedImages:
    if not patches:
        pixels = torch.zeros(frames, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
        return PackedImages(pixels, frames, torch.zeros(3, 256))
    side = vision.patch_size
    pixels = torch.zeros(frames * patches, 3, side, side, dtype=torch.uint8)
    lengths = Segments.of([patches] * frames)
    return PackedImages(pixels, frames, torch.zeros(3, 256), lengths, torch.zeros(frames * patches, dtype=torch.int64))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a batch."""
    if isinstance(value, Tensor):
        return [value]
    if not is_dataclass(value):
        return []
    return [tensor for field in fields(value) for tensor in _tensors(getattr(value, field.name))]
