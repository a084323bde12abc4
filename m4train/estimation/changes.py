"""Changes of a configuration, each estimated: what would make it fit, and what each does to the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from m4train.config import Config, FreezeRule
from m4train.config.checks import check
from m4train.config.compose import resource_folder
from m4train.errors import ConfigError
from m4train.estimation.ranks import PER_NODE, RankMemory
from m4train.estimation.subject import Subject
from m4train.parts import EMBEDDINGS, LM_HEAD, NEW_TOKENS, VISION
from m4train.terminal import stage


@dataclass(frozen=True)
class Change:
    """A change of the configuration with which the run would need `memory`."""

    overrides: tuple[str, ...]
    memory: RankMemory
    fits: bool


def changes_that_fit(subject: Subject, capacity: float) -> list[Change]:
    """Each change that would make the run fit by itself; if there is none, changes one after the other until it does."""
    alone = [found for each in CHANGES if (found := _changed(subject, capacity, [each])) is not None]
    enough = [change for change in alone if change.fits]
    if enough:
        return enough
    best = _changed(subject, capacity, CHANGES)
    few, many = 1, len(CHANGES)  # the first do not do, so many do: each needs less memory than those before it
    while best is not None and best.fits and many - few > 1:
        count = (few + many) // 2
        found = _changed(subject, capacity, CHANGES[:count])
        if found is not None and found.fits:
            best, many = found, count
        else:
            few = count
    return [] if best is None else [best]


# Changes a configuration for so many ranks, and returns the overrides that do the same; none if it is that already.
_Act = Callable[[Config, int], Sequence[str]]


def _changed(subject: Subject, capacity: float | None, chosen: Sequence[_Act]) -> Change | None:
    """The changes among `chosen` that are possible, one after the other; None if there are none."""
    config, overrides = applied(subject.config, subject.ranks, chosen)
    if not overrides:
        return None
    stage(f"estimating {' '.join(overrides)}")
    memory = replace(subject, config=config).memory()
    return Change(overrides, memory, capacity is None or memory.expected <= capacity)


def applied(config: Config, ranks: int, chosen: Sequence[_Act]) -> tuple[Config, tuple[str, ...]]:
    """What the changes among `chosen` that are possible make of a configuration, and the overrides that do the same."""
    said: dict[str, str] = {}
    for act in chosen:
        tried = copy.deepcopy(config)
        overrides = act(tried, ranks)
        if overrides and _allowed(tried):
            config = tried
            said |= {override.partition("=")[0]: override for override in overrides}
    return config, tuple(said.values())


def _allowed(config: Config) -> bool:
    try:
        check(config, sources=False)
    except ConfigError:
        return False
    return True


def _sets(key: str, value: Any, when: Callable[[Config, int], bool]) -> _Act:
    """Sets a key to another value, if it is `when` that helps."""
    group, _, name = key.partition(".")

    def act(config: Config, ranks: int) -> Sequence[str]:
        if not when(config, ranks) or getattr(getattr(config, group), name) == value:
            return ()
        setattr(getattr(config, group), name, value)
        said = str(value).lower() if isinstance(value, bool) else value
        return (f"{group if name == 'name' else key}={said}",)  # groups are named by their choice

    return act


def _half_frozen(config: Config, ranks: int) -> bool:
    frozen = bool(config.freeze.rules) or config.adapter.kind != "none"
    return config.freeze.frozen_dtype is None and frozen and config.trainer.precision == "bf16"


def _lora(config: Config, ranks: int) -> Sequence[str]:
    if config.adapter.kind != "none":
        return ()
    for key, value in _choice("adapter/lora").items():
        setattr(config.adapter, key, value)
    config.freeze.rules = [FreezeRule(**rule) for rule in _choice("freeze/adapted_text")["rules"]]
    frozen = sorted({VISION, EMBEDDINGS, NEW_TOKENS, LM_HEAD} & config.optimizer.parts.keys())
    for part in frozen:
        del config.optimizer.parts[part]  # which no longer train
    return ("adapter=lora", "freeze=adapted_text", *(f"~optimizer.parts.{part}" for part in frozen))


def _four_bits(config: Config, ranks: int) -> Sequence[str]:
    if config.adapter.kind != "lora":
        return ()
    config.adapter.kind, config.adapter.quantize = "qlora", _choice("adapter/qlora")["quantize"]
    return ("adapter=qlora",)


def _half_length(config: Config, ranks: int) -> Sequence[str]:
    data = config.data
    data.sequence_length, data.images_per_pack = data.sequence_length // 2, max(1, data.images_per_pack // 2)
    keys = (f"data.sequence_length={data.sequence_length}", f"data.images_per_pack={data.images_per_pack}")
    return keys if data.sequence_length >= 512 else ()


def _more_packs(config: Config, ranks: int) -> Sequence[str]:
    trainer = config.trainer
    trainer.micro_batch_size *= 2
    possible = trainer.micro_batch_size * ranks <= trainer.global_batch_size
    return (f"trainer.micro_batch_size={trainer.micro_batch_size}",) if possible else ()


def _choice(name: str) -> dict[str, Any]:
    """What a choice of a group of conf/ says."""
    return OmegaConf.to_container(OmegaConf.load(resource_folder("conf") / f"{name}.yaml"))  # type: ignore[return-value]


def _always(config: Config, ranks: int) -> bool:
    return True


_DATA_PARALLEL = ("single", "ddp", "zero1", "zero2")
_OFFLOADING = ("fsdp2", "zero1", "zero2", "zero3")
# From those that cost nothing but time to those that train something else.
CHANGES: tuple[_Act, ...] = (
    _sets("trainer.gradient_checkpointing", True, _always),
    _sets("trainer.micro_batch_size", 1, _always),
    _sets("freeze.frozen_dtype", "bf16", _half_frozen),
    _sets("engine.name", "fsdp2", lambda config, ranks: ranks > 1 and config.engine.name in _DATA_PARALLEL),
    _sets("optimizer.name", "adamw_8bit", lambda config, _: config.optimizer.name == "adamw"),
    _sets("engine.offload", True, lambda config, _: config.engine.name in _OFFLOADING),
    _lora,
    _four_bits,
    _half_length,
)
_VARIANTS: tuple[_Act, ...] = (
    *CHANGES,
    _sets("trainer.gradient_checkpointing", False, _always),
    _more_packs,
    _sets("trainer.precision", "fp32", _always),
    _sets("trainer.precision", "bf16", lambda config, _: config.trainer.precision == "fp32"),
    _sets("engine.shard_within_node", True, lambda config, ranks: config.engine.name == "fsdp2" and ranks > PER_NODE),
    _sets("engine.shard_within_node", False, _always),
)


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
