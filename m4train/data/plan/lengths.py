"""Lengths as people say them: epochs, shares of a run and `epoch` become optimizer steps, counted from the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from m4train.config import EVERY, Config
from m4train.config.checks import check_schedule
from m4train.data.plan.plan import Plan
from m4train.errors import ConfigError

EPOCH = "epoch"


def needs_plan(config: Config) -> bool:
    """Whether a length of the run is in passes over its data."""
    return config.trainer.epochs is not None or EPOCH in [getattr(config.trainer, key) for key in EVERY]


def settled(config: Config, plan: Callable[[], Plan]) -> Config:
    """A copy of the configuration with every length in optimizer steps. `plan` is called if data must be counted.

    Raises ConfigError if a source is streamed, of which nobody knows the length, or if the lengths do not fit together.
    """
    config = copy.deepcopy(config)
    trainer, schedule = config.trainer, config.schedule
    epoch = 0
    if needs_plan(config):
        streamed = [name for name, source in config.data.sources.items() if source.stream]
        if streamed:
            raise ConfigError(
                f"trainer.epochs and `{EPOCH}` count the samples of a source, but data.sources.{streamed[0]}.stream is true: say "
                "trainer.max_steps, and the others in steps."
            )
        counted = plan()
        if trainer.epochs is not None:
            trainer.max_steps = steps_of(counted, trainer.epochs, trainer.epochs_until)
            trainer.epochs = None
        if EPOCH in [getattr(trainer, key) for key in EVERY]:
            epoch = steps_of(counted, 1.0, trainer.epochs_until)
    for key in EVERY:
        value = getattr(trainer, key)
        if value == EPOCH:
            setattr(trainer, key, epoch)
        elif isinstance(value, float):
            setattr(trainer, key, max(1, round(value * trainer.max_steps)))
    if schedule.warmup_fraction is not None:
        schedule.warmup_steps = round(schedule.warmup_fraction * trainer.max_steps)
        schedule.warmup_fraction = None
    check_schedule(schedule, trainer.max_steps)
    return config


def steps_of(plan: Plan, epochs: float, until: str) -> int:
    """The optimizer step after which the `first` or the `last` source has been trained on in whole this many times, or at which
    the data end. Raises ConfigError if there is nothing to train on."""
    ended: set[str] = set()
    enough = 1 if until == "first" else len(plan.sources)
    number = 0
    for step in plan.steps():
        number = step.step
        for index, source in enumerate(plan.sources):
            if source.name not in ended and _is_through(step.state, index, source.name, len(source), epochs):
                ended.add(source.name)
        if len(ended) >= enough:
            return number
    if not number:
        raise ConfigError("data.sources hold nothing that can be packed: look at `m4train data stats`.")
    return number


def _is_through(state: Mapping[str, Any], index: int, name: str, size: int, epochs: float) -> bool:
    """Whether all samples of the first `epochs` passes over a source are in steps that were made."""
    held = _held(state, index)
    cursor = state["streams"][name]
    drawn = cursor["epoch"] * size + cursor["position"]
    return drawn - len(held) >= epochs * size and all(epoch >= int(epochs) for epoch, _ in held)


def _held(state: Mapping[str, Any], index: int) -> set[tuple[int, int]]:
    """Epoch and number of the samples of a source that are drawn but not yet in a pack of a step, in whole or in part."""
    waiting = [*state["pool"], *state["waiting"], *(unit for units in state["closed"] for unit in units)]
    return {(unit[2], unit[1]) for unit in waiting if unit[0] == index}


def passes(plan: Plan, state: Mapping[str, Any], until: str) -> dict[str, float]:
    """`epoch`, how often the run has passed over its data by `state`, and `epoch/SOURCE` for each of several."""
    found = {}
    for index, source in enumerate(plan.sources):
        cursor = state["streams"][source.name]
        seen = cursor["epoch"] * len(source) + cursor["position"] - len(_held(state, index))
        found[source.name] = seen / max(1, len(source))
    whole = (max if until == "first" else min)(found.values())
    return {"epoch": whole, **({f"epoch/{name}": one for name, one in found.items()} if len(found) > 1 else {})}


def batch_line(config: Config, ranks: int, samples: float | None) -> str:
    """How many packs an optimizer step takes, and how they come about; `samples` is their mean number per step."""
    trainer = config.trainer
    each = ranks * trainer.micro_batch_size
    rounds = -(-trainer.global_batch_size // each)
    text = f"batch: {trainer.global_batch_size} packs a step = {ranks} ranks x {trainer.micro_batch_size} micro x {rounds} accumulation"
    if rounds * each != trainer.global_batch_size:
        text += f" (less {rounds * each - trainer.global_batch_size})"
    return text if samples is None else f"{text}; about {samples:.4g} samples"
