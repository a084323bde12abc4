"""What a person should know before a run starts: how often it passes over its data, and where its schedule ends."""

from __future__ import annotations

from itertools import islice

from m4train.config import Config
from m4train.data.plan.lengths import batch_line
from m4train.data.plan.plan import Plan, StepPlan
from m4train.training.schedule import rate_factor

MANY_PASSES = 20.0  # over one source
_PLANNED = (
    30  # steps that are planned to know the pace; the pool of documents that packing chooses among is full by then
)
_BARELY = 0.9  # of the peak rate: a decaying schedule that ends above it has hardly begun


def outlook(plan: Plan, config: Config, ranks: int = 1) -> list[str]:
    """How the packs of a step come about, and sentences about what looks wrong with the length of a run."""
    planned = list(islice(plan.steps(), min(_PLANNED, config.trainer.max_steps)))
    samples = [
        len({(unit.source, unit.sample, unit.epoch) for pack in step.packs for unit in pack.units}) for step in planned
    ]
    return [batch_line(config, ranks, sum(samples) / len(samples) if samples else None), *_notes(plan, config, planned)]


def _notes(plan: Plan, config: Config, planned: list[StepPlan]) -> list[str]:
    steps, passes = _pace(plan, config, planned)
    said = [
        f"the run passes over source {name} about {round(times)} times (trainer.max_steps={config.trainer.max_steps})."
        for name, times in passes.items()
        if times > MANY_PASSES
    ]
    schedule, about = config.schedule, "" if steps == config.trainer.max_steps else "about "
    if 0 < schedule.warmup_steps >= steps:
        said.append(f"the run ends after {about}{steps} steps, before its warm-up of {schedule.warmup_steps} is over.")
    elif schedule.name != "constant" and schedule.final_fraction < _BARELY:
        last = rate_factor(schedule, config.trainer.max_steps, steps)
        if last > _BARELY:
            said.append(
                f"schedule={schedule.name} ends at {last:.1%} of the peak rate: the run has {about}{steps} steps, and the schedule "
                f"{config.trainer.max_steps} (trainer.max_steps)."
            )
    return [f"note: {sentence}" for sentence in said]


def _pace(plan: Plan, config: Config, planned: list[StepPlan]) -> tuple[int, dict[str, float]]:
    """How many steps the run has, and how often it passes over each source, from its first steps."""
    if not planned:
        return config.trainer.max_steps, {}
    samples = [len({(unit.sample, unit.epoch) for unit in units}) for units in _units(planned, len(plan.sources))]
    wanted = config.trainer.max_steps / len(planned)  # as if every step were like these
    passes = {s.name: count * wanted / len(s) for s, count in zip(plan.sources, samples, strict=True)}
    if len(planned) < min(_PLANNED, config.trainer.max_steps):
        return len(planned), {name: min(times, 1.0) for name, times in passes.items()}
    limits = {s.name: plan.data.epochs if s.config.epochs is None else s.config.epochs for s in plan.sources}
    if any(limit is None for limit in limits.values()):
        return config.trainer.max_steps, {n: times for n, times in passes.items() if limits[n] is None}
    share = max((limits[name] or 0) / times if times else 0.0 for name, times in passes.items())
    steps = min(config.trainer.max_steps, max(1, round(config.trainer.max_steps * share)))
    return steps, {name: min(times, float(limits[name] or 0)) for name, times in passes.items()}


def _units(planned: list, sources: int) -> list[list]:
    """The planned segments of each source."""
    units: list[list] = [[] for _ in range(sources)]
    for step in planned:
        for pack in step.packs:
            for unit in pack.units:
                units[unit.source].append(unit)
    return units
