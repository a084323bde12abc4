"""What is estimated, and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from m4train.config import Config
from m4train.estimation.calibration import Calibration
from m4train.estimation.ranks import RankMemory, Sizes, rank_memory, sizes
from m4train.estimation.step import BatchShape
from m4train.gpus import GPUS
from m4train.training.compiling import without_break

SHARES = (0.25, 0.40, 0.55)  # of the peak that training reaches, with what it computes again: poor, usual, very good
IMAGES_PER_CORE = (
    40.0  # photos of one megapixel that a core reads, decodes and tiles in a second, see benchmarks/README.md
)


@dataclass(frozen=True)
class Subject:
    """What is estimated: a configuration, the architecture of its model, and the dtype its weights are stored in."""

    config: Config
    architecture: Any
    stored: torch.dtype | None
    ranks: int = 1
    gpu: str | None = None
    on: str | None = None  # cpu or cuda; None: as `gpu` says
    calibration: Calibration | None = None

    @property
    def device(self) -> str:
        return self.on or ("cpu" if self.gpu is None else "cuda")

    @property
    def compiled(self) -> bool:
        """Whether the run compiles its blocks, if the machine has what that takes."""
        asked = self.config.trainer.compile
        return (self.device == "cuda" and without_break(self.config)) if asked == "auto" else bool(asked)

    @property
    def shape(self) -> BatchShape:
        """The most that a micro-batch can hold."""
        data, packs = self.config.data, self.config.trainer.micro_batch_size
        vision = self.architecture.vision_config
        packed = self.config.model.family == "idefics2"
        patches = (vision.image_size // vision.patch_size) ** 2 if packed else 0
        return BatchShape(data.sequence_length * packs, data.images_per_pack * packs, patches)

    def memory(self) -> RankMemory:
        found = rank_memory(self.config, self.architecture, self.shape, self.ranks, self.stored, self.device)
        return found if self.calibration is None else replace(found, measured=self.calibration.memory_factor)

    def sizes(self) -> Sizes:
        return sizes(self.config, self.architecture, self.shape, self.stored)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the largest micro-batch, forward and backward: what is progress, and with what gradient
    checkpointing computes again."""

    once: float
    whole: float

    @classmethod
    def of(
        cls, config: Config, flops: Mapping[str, float], factors: Mapping[str, float], blocks: Sequence[str]
    ) -> Work:
        """Of the operations of a forward pass and how many of them a step does, by part; `blocks` are computed again."""
        once = sum(flops[part] * factors[part] for part in flops)
        again = sum(flops.get(part, 0.0) for part in blocks) if config.trainer.gradient_checkpointing else 0.0
        return cls(once, once + again)


@dataclass(frozen=True)
class Speed:
    """Of all ranks together; `days` for all of trainer.max_steps. `mfu`: progress as a share of the peak, None if that is not
    known."""

    mfu: float | None
    step_seconds: float
    tokens_per_second: float
    frames_per_second: float
    days: float
    cores: float  # that must decode images for it


def speeds(subject: Subject, work: Work, frames: int, mfu: float | None = None) -> list[Speed]:
    """As fast as was measured, or at one share of the peak, or at three; none if there is nothing to go by. `frames`: of a
    micro-batch."""
    peak = None if subject.gpu is None else GPUS[subject.gpu].flops
    measured = None if subject.calibration is None else subject.calibration.operations_per_second
    if mfu is not None:
        rates = [] if peak is None else [peak * mfu * work.whole / work.once]
    elif measured is not None:
        rates = [measured]
    else:
        rates = [] if peak is None else [peak * share for share in SHARES]
    return [_speed(subject, work, frames, rate, peak) for rate in rates]


def _speed(subject: Subject, work: Work, frames: int, rate: float, peak: float | None) -> Speed:
    """At `rate` operations a second of one rank."""
    trainer = subject.config.trainer
    packs = trainer.global_batch_size / trainer.micro_batch_size
    seconds = packs * work.whole / (rate * subject.ranks)
    images = packs * frames / seconds
    return Speed(
        mfu=None if peak is None else rate / peak * work.once / work.whole,
        step_seconds=seconds,
        tokens_per_second=trainer.global_batch_size * subject.config.data.sequence_length / seconds,
        frames_per_second=images,
        days=seconds * trainer.max_steps / 86400,
        cores=images / IMAGES_PER_CORE,
    )
