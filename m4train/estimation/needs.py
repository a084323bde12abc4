"""Everything `m4train estimate` says of a configuration: memory, time, data and storage, and what would make it fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from m4train.config import Config, FreezeRule
from m4train.config.checks import check
from m4train.errors import ConfigError
from m4train.estimation.ranks import RankMemory, Sizes, rank_memory, sizes
from m4train.estimation.step import BatchShape, frames_at_most
from m4train.gpus import GPUS, Gpu
from m4train.parts import EMBEDDINGS, LM_HEAD, NEW_TOKENS, TEXT, VISION

MFU = (0.25, 0.40, 0.55)  # share of the peak that training reaches: poor, usual, very good
IMAGES_PER_CORE = (
    40.0  # photos of one megapixel that a core reads, decodes and tiles in a second, see benchmarks/README.md
)
DISK = 1e9  # bytes a second of one node to shared storage


@dataclass(frozen=True)
class Subject:
    """What is estimated: a configuration, the architecture of its model, and the dtype its weights are stored in."""

    config: Config
    architecture: Any
    stored: torch.dtype | None
    ranks: int = 1
    gpu: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else "cuda"

    @property
    def shape(self) -> BatchShape:
        """The most that a micro-batch can hold."""
        data, packs = self.config.data, self.config.trainer.micro_batch_size
        vision = self.architecture.vision_config
        packed = self.config.model.family == "idefics2"
        patches = (vision.image_size // vision.patch_size) ** 2 if packed else 0
        return BatchShape(data.sequence_length * packs, data.images_per_pack * packs, patches)

    def memory(self) -> RankMemory:
        return rank_memory(self.config, self.architecture, self.shape, self.ranks, self.stored, self.device)

    def sizes(self) -> Sizes:
        return sizes(self.config, self.architecture, self.shape, self.stored)


@dataclass(frozen=True)
class Speed:
    """Of all ranks together, at one share of the peak; `days` for all of trainer.max_steps."""

    mfu: float
    step_seconds: float
    tokens_per_second: float
    frames_per_second: float
    days: float
    cores: float  # that must decode images for it


@dataclass(frozen=True)
class Change:
    """A change of the configuration with which the run would need `memory`."""

    overrides: tuple[str, ...]
    memory: RankMemory
    fits: bool


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
    changes: list[Change]

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.memory.expected <= self.capacity


def estimate(subject: Subject, mfu: float | None = None) -> Estimate:
    """Estimates a configuration. Raises ConfigError for batches that cannot be shared among the ranks."""
    trainer = subject.config.trainer
    if trainer.global_batch_size < subject.ranks:
        raise ConfigError(
            f"trainer.global_batch_size={trainer.global_batch_size} cannot be shared among --ranks {subject.ranks}: raise it, or estimate fewer ranks."
        )
    size, memory = subject.sizes(), subject.memory()
    gpu = None if subject.gpu is None else GPUS[subject.gpu]
    whole = trainer.global_batch_size / trainer.micro_batch_size
    once = sum(size.flops[part] * size.factors[part] for part in size.flops)
    again = sum(size.flops.get(part, 0.0) for part in size.blocks) if trainer.gradient_checkpointing else 0.0
    tokens = float(trainer.global_batch_size * subject.config.data.sequence_length)
    frames = frames_at_most(subject.architecture, subject.shape)
    speeds = []
    if gpu is not None:
        for share in MFU if mfu is None else (mfu,):
            seconds = whole * (once + again) / (gpu.flops * share * subject.ranks)
            images = whole * frames / seconds
            days = seconds * trainer.max_steps / 86400
            speeds.append(Speed(share, seconds, tokens / seconds, images, days, images / IMAGES_PER_CORE))
    written = size.frozen_bytes + size.whole_bytes + size.trained_bytes + _moments(subject.config) * size.trained_bytes
    found = Estimate(
        subject=subject,
        sizes=size,
        memory=memory,
        capacity=None if gpu is None else gpu.memory,
        frames=frames,
        step_flops=whole * once,
        speeds=speeds,
        tokens=tokens * trainer.max_steps,
        checkpoint_bytes=written,
        checkpoint_seconds=written / (DISK * max(1, subject.ranks // 8)),
        changes=[],
    )
    if found.fits:
        return found
    assert gpu is not None
    return replace(found, changes=changes_that_fit(subject, gpu))


def _moments(config: Config) -> float:
    """Bytes of the optimizer's state per byte of what trains."""
    return 0.5 if config.optimizer.name == "adamw_8bit" else 1.0 if config.optimizer.name == "muon" else 2.0


def changes_that_fit(subject: Subject, gpu: Gpu) -> list[Change]:
    """Each change that would make the run fit by itself; if there is none, changes one after the other until it does."""
    alone = [found for each in _CHANGES if (found := _changed(subject, gpu, [each])) is not None]
    enough = [change for change in alone if change.fits]
    if enough:
        return enough
    best: Change | None = None
    for count in range(2, len(_CHANGES) + 1):
        best = _changed(subject, gpu, _CHANGES[:count]) or best
        if best is not None and best.fits:
            break
    return [] if best is None else [best]


_Act = Callable[[Config, int], bool]


def _changed(subject: Subject, gpu: Gpu, chosen: list[tuple[str, _Act]]) -> Change | None:
    """The changes among `chosen` that are possible, one after the other; None if there are none."""
    config, said = copy.deepcopy(subject.config), []
    for overrides, act in chosen:
        tried = copy.deepcopy(config)
        if act(tried, subject.ranks) and _allowed(tried):
            config = tried
            said.append(overrides)
    if not said:
        return None
    memory = replace(subject, config=config).memory()
    return Change(tuple(said), memory, memory.expected <= gpu.memory)


def _allowed(config: Config) -> bool:
    try:
        check(config)
    except ConfigError:
        return False
    return True


def _checkpointing(config: Config, ranks: int) -> bool:
    was, config.trainer.gradient_checkpointing = config.trainer.gradient_checkpointing, True
    return not was


def _one_pack(config: Config, ranks: int) -> bool:
    was, config.trainer.micro_batch_size = config.trainer.micro_batch_size, 1
    return was > 1


def _half_frozen(config: Config, ranks: int) -> bool:
    was, config.freeze.frozen_dtype = config.freeze.frozen_dtype, "bf16"
    frozen = bool(config.freeze.rules) or config.adapter.kind != "none"
    return was is None and frozen and config.trainer.precision == "bf16"


def _eight_bits(config: Config, ranks: int) -> bool:
    was, config.optimizer.name = config.optimizer.name, "adamw_8bit"
    return was == "adamw"


def _shard(config: Config, ranks: int) -> bool:
    was, config.engine.name = config.engine.name, "fsdp2"
    return ranks > 1 and was in ("single", "ddp", "zero1", "zero2")


def _offload(config: Config, ranks: int) -> bool:
    was, config.engine.offload = config.engine.offload, True
    return not was and config.engine.name in ("fsdp2", "zero1", "zero2", "zero3")


def _lora(config: Config, ranks: int) -> bool:
    was = config.adapter.kind
    config.adapter.kind, config.adapter.targets = "lora", {TEXT: ["q_proj", "k_proj", "v_proj", "o_proj"]}
    config.freeze.rules = _adapted_text()
    for part in {VISION, EMBEDDINGS, NEW_TOKENS, LM_HEAD} & config.optimizer.parts.keys():
        del config.optimizer.parts[part]  # which no longer train
    return was == "none"


def _four_bits(config: Config, ranks: int) -> bool:
    was, config.adapter.kind = config.adapter.kind, "qlora"
    return was == "lora"


def _half_length(config: Config, ranks: int) -> bool:
    config.data.sequence_length //= 2
    config.data.images_per_pack = max(1, config.data.images_per_pack // 2)
    return config.data.sequence_length >= 512


def _adapted_text() -> list[Any]:
    return [FreezeRule(trainable=False), FreezeRule(part="connector", trainable=True)]


# From those that cost nothing but time to those that train something else.
_CHANGES: list[tuple[str, _Act]] = [
    ("trainer.gradient_checkpointing=true", _checkpointing),
    ("trainer.micro_batch_size=1", _one_pack),
    ("freeze.frozen_dtype=bf16", _half_frozen),
    ("engine=fsdp2", _shard),
    ("optimizer=adamw_8bit", _eight_bits),
    ("engine.offload=true", _offload),
    ("adapter=lora freeze=adapted_text", _lora),
    ("adapter=qlora", _four_bits),
    ("half of data.sequence_length and data.images_per_pack", _half_length),
]
