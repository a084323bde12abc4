"""One training step of the real model under fake tensors: every allocation is counted, none is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from m4train.batch import CrossSegments, PackedBatch, PackedImages, Segments
from m4train.config import Config
from m4train.estimation.four_bit import standing_in
from m4train.estimation.tracker import MemoryTracker
from m4train.families import FAMILIES
from m4train.models import loss
from m4train.training.engines.single import SingleEngine
from m4train.training.equip import equip
from m4train.training.precision import half_of

HELD = ("parameters", "buffers", "gradients", "optimizer", "activations", "passing", "batch")


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


class _Engine(SingleEngine):
    """A single process whose model stays where it is: fake tensors cannot be moved in place."""

    def prepare(self, model: Any) -> None:
        with _staying():
            super().prepare(model)

    def optimise(self, trainable: dict[str, nn.Parameter], updated: dict[str, nn.Parameter] | None = None) -> None:
        if self.config.optimizer.name != "adamw_8bit":
            super().optimise(trainable, updated)
            return
        self.trainable = trainable
        self.optimizer = torch.optim.SGD(trainable.values(), lr=0.0)
        self.optimizer.state.update({parameter: _moments_in_bytes(parameter) for parameter in trainable.values()})

    def update(self, factor: float, max_norm: float) -> Any:
        """Optimizers that look at values on their way cannot run on fake ones; what they need besides their state is small."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            return super().update(factor, max_norm)
        return self.optimizer.zero_grad(set_to_none=True)


def _moments_in_bytes(parameter: Tensor) -> dict[str, Tensor]:
    """The state of 8-bit AdamW, whose kernels take no fake tensors: a byte per value and moment, and scales of blocks of 256."""
    count = parameter.numel()
    if count < 4096:  # these it keeps in fp32
        return {"state1": torch.empty(count), "state2": torch.empty(count)}
    kinds = {"state": (count, torch.uint8), "absmax": (-(-count // 256), torch.float32)}
    return {f"{kind}{i}": torch.empty(size, dtype=dtype) for kind, (size, dtype) in kinds.items() for i in (1, 2)}


@contextmanager
def _staying() -> Iterator[None]:
    moved = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self
    try:
        yield
    finally:
        nn.Module.to = moved


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
    half: bool = False,
) -> StepMemory:
    """Memory at the peak of a whole step on one process, with `architecture` (a model's configuration) in full.

    `device` cpu or cuda says whose chunk sizes are used; the tensors are fake ones of the CPU. `stored` is the dtype of the
    weights in their file (None: fp32, as new ones are); `half`: all weights are in the run's precision when they are used.
    """
    config = replace(config, trainer=replace(config.trainer, precision=_counted_as(config.trainer.precision)))
    with FakeTensorMode(allow_non_fake_inputs=True), _chunks_of(device):
        model = fake_model(config, architecture, stored)
        engine = _Engine(config, "cpu")
        engine.prepare(model)
        if half:
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(half_of(config.trainer.precision))
        model.train()
        batch = worst_case(architecture, shape)
        tracker = MemoryTracker()
        tracker.hold("parameters", model.parameters())
        tracker.hold("buffers", model.buffers())
        tracker.hold(
            "optimizer",
            (v for state in engine.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        )
        tracker.hold("batch", _tensors(batch))
        tracker.gradients_of(model.parameters())
        with tracker:
            output = engine.forward(batch, config.model.z_loss)
            tracker.phase = "passing"
            engine.backward(output.loss, True)
            engine.update(1.0, config.trainer.max_grad_norm)
    peak = {name: float(tracker.peak.get(name, 0)) for name in HELD}
    return StepMemory(**peak, working=float(tracker.working))


def _counted_as(precision: str) -> str:
    """bf16 for fp16, which is as wide: autocast of the CPU takes no weights in bf16 next to it."""
    return "bf16" if precision == "fp16" else precision


def fake_model(config: Config, architecture: Any, stored: torch.dtype | None = None) -> Any:
    """The model as training has it, of weights that are `stored` so in their file (None: fp32, as new ones are)."""
    model = FAMILIES[config.model.family].model_class(architecture)
    model.loss_kind = config.model.loss
    if stored is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored)
    with _staying(), standing_in():
        equip(model, config)
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
