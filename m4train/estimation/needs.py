"""Everything `m4train estimate` says of a configuration: memory, time, data and storage, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from m4train.errors import ConfigError
from m4train.estimation.changes import Change, changes_that_fit, limits, what_if
from m4train.estimation.ranks import RankMemory, Sizes
from m4train.estimation.step import frames_at_most
from m4train.estimation.subject import Speed, Subject, Work, speeds
from m4train.gpus import GPUS
from m4train.terminal import stage

DISK = 1e9  # bytes a second of one node to shared storage


@dataclass(frozen=True)
class Estimate:
    """What `m4train estimate` prints. Bytes and seconds; `capacity` is the memory of the GPU, None without one."""

    subject: Subject
    sizes: Sizes
    memory: RankMemory
    capacity: float | None
    frames: int  # of one micro-batch of one rank at most
    step_flops: float  # of all ranks, without what is computed again
    speeds: list[Speed]
    tokens: float  # of the whole run
    checkpoint_bytes: float
    checkpoint_seconds: float
    changes: list[Change]  # that would make it fit
    variants: list[Change] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)  # key -> the largest value that still fits

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.memory.expected <= self.capacity


def estimate(subject: Subject, mfu: float | None = None, variants: bool = False) -> Estimate:
    """Estimates a configuration; `variants`: also what changes of it would need, and how much more it could hold. Raises ConfigError for batches that cannot be shared among the ranks."""
    trainer = subject.config.trainer
    if trainer.global_batch_size < subject.ranks:
        raise ConfigError(
            f"trainer.global_batch_size={trainer.global_batch_size} cannot be shared among --ranks {subject.ranks}: raise it, or estimate fewer ranks."
        )
    stage("estimating")
    size, memory = subject.sizes(), subject.memory()
    gpu = None if subject.gpu is None else GPUS[subject.gpu]
    whole = trainer.global_batch_size / trainer.micro_batch_size
    work = Work.of(subject.config, size.flops, size.factors, size.blocks)
    tokens = float(trainer.global_batch_size * subject.config.data.sequence_length)
    frames = frames_at_most(subject.architecture, subject.shape)
    found = Estimate(
        subject=subject,
        sizes=size,
        memory=memory,
        capacity=None if gpu is None else gpu.memory,
        frames=frames,
        step_flops=whole * work.once,
        speeds=speeds(subject, work, frames, mfu),
        tokens=tokens * trainer.max_steps,
        checkpoint_bytes=size.checkpoint_bytes,
        checkpoint_seconds=size.checkpoint_bytes / (DISK * max(1, subject.ranks // 8)),
        changes=[],
    )
    if variants:
        most = {} if gpu is None else limits(subject, gpu.memory)
        found = replace(found, variants=what_if(subject, found.capacity), limits=most)
    if found.fits:
        return found
    assert gpu is not None
    return replace(found, changes=changes_that_fit(subject, gpu.memory))
