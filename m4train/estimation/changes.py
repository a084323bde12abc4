"""Changes of a configuration, each estimated: what would make it fit, and what each does to the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from m4train.config import Config, FreezeRule
from m4train.config.checks import check
from m4train.errors import ConfigError
from m4train.estimation.ranks import PER_NODE, RankMemory
from m4train.estimation.subject import Subject
from m4train.parts import EMBEDDINGS, LM_HEAD, NEW_TOKENS, TEXT, VISION


@dataclass(frozen=True)
class Change:
    """A change of the configuration with which the run would need `memory`."""

    overrides: tuple[str, ...]
    memory: RankMemory
    fits: bool


def changes_that_fit(subject: Subject, capacity: float) -> list[Change]:
    """Each change that would make the run fit by itself; if there is none, changes one after the other until it does."""
    alone = [found for each in _CHANGES if (found := _changed(subject, capacity, [each])) is not None]
    enough = [change for change in alone if change.fits]
    if enough:
        return enough
    best: Change | None = None
    for count in range(2, len(_CHANGES) + 1):
        best = _changed(subject, capacity, _CHANGES[:count]) or best
        if best is not None and best.fits:
            break
    return [] if best is None else [best]


_Act = Callable[[Config, int], bool]


def _changed(subject: Subject, capacity: float | None, chosen: list[tuple[str, _Act]]) -> Change | None:
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
    return Change(tuple(said), memory, capacity is None or memory.expected <= capacity)


def _allowed(config: Config) -> bool:
    try:
        check(config, sources=False)
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


def _kept_activations(config: Config, ranks: int) -> bool:
    was, config.trainer.gradient_checkpointing = config.trainer.gradient_checkpointing, False
    return was


def _more_packs(config: Config, ranks: int) -> bool:
    config.trainer.micro_batch_size *= 2
    return config.trainer.micro_batch_size * ranks <= config.trainer.global_batch_size


def _fp32(config: Config, ranks: int) -> bool:
    was, config.trainer.precision = config.trainer.precision, "fp32"
    return was != "fp32"


def _bf16(config: Config, ranks: int) -> bool:
    was, config.trainer.precision = config.trainer.precision, "bf16"
    return was == "fp32"


def _within_node(config: Config, ranks: int) -> bool:
    was, config.engine.shard_within_node = config.engine.shard_within_node, True
    return not was and config.engine.name == "fsdp2" and ranks > PER_NODE


def _across_nodes(config: Config, ranks: int) -> bool:
    was, config.engine.shard_within_node = config.engine.shard_within_node, False
    return was


_VARIANTS: list[tuple[str, _Act]] = [
    *_CHANGES,
    ("trainer.gradient_checkpointing=false", _kept_activations),
    ("twice trainer.micro_batch_size", _more_packs),
    ("trainer.precision=fp32", _fp32),
    ("trainer.precision=bf16", _bf16),
    ("engine.shard_within_node=true", _within_node),
    ("engine.shard_within_node=false", _across_nodes),
]


def what_if(subject: Subject, capacity: float | None) -> list[Change]:
    """What each change that is possible by itself does to the memory of a rank."""
    found = [change for each in _VARIANTS if (change := _changed(subject, capacity, [each])) is not None]
    alone = subject.config.engine.name == "single"
    for ranks in sorted({subject.ranks * 2, max(1, subject.ranks // 2)} - {subject.ranks}):
        if not alone and ranks <= subject.config.trainer.global_batch_size:
            memory = replace(subject, ranks=ranks).memory()
            found.append(Change((f"--ranks {ranks}",), memory, capacity is None or memory.expected <= capacity))
    return found


def limits(subject: Subject, capacity: float) -> dict[str, int]:
    """The largest trainer.micro_batch_size, and data.sequence_length in steps of 128, with which the run still fits; 0: none."""

    def packs(count: int) -> Subject:
        config = copy.deepcopy(subject.config)
        config.trainer.micro_batch_size = count
        config.trainer.global_batch_size = max(config.trainer.global_batch_size, count * subject.ranks)
        return replace(subject, config=config)

    def length(count: int) -> Subject:
        config = copy.deepcopy(subject.config)
        config.data.sequence_length = 128 * count
        return replace(subject, config=config)

    least = max(1, -(-getattr(subject.architecture, "tokens_per_image", 1) // 128))
    return {
        "trainer.micro_batch_size": _most(packs, 1, capacity),
        "data.sequence_length": 128 * _most(length, least, capacity),
    }


def _most(made: Callable[[int], Subject], least: int, capacity: float) -> int:
    """The largest count whose memory is at most `capacity`, by secants: memory is nearly linear in it."""
    known = {count: made(count).memory().expected for count in (least, 2 * least)}
    while True:
        fitting = max((count for count in known if known[count] <= capacity), default=0)
        above = min((count for count in known if known[count] > capacity), default=64 * fitting)
        if above <= fitting + 1 or above <= least or fitting > 2**20:
            return fitting
        one, other = sorted(known, key=lambda count: abs(known[count] - capacity))[:2]
        slope = max(1.0, (known[other] - known[one]) / (other - one))
        guess = one + int((capacity - known[one]) / slope)
        count = min(max(guess, fitting + 1, least), above - 1)
        known[count] = made(count).memory().expected
