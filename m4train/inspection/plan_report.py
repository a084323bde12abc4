"""`m4train plan`: what a run would see, computed from the indexes alone; no sample is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from m4train.config import DataConfig
from m4train.data.plan.amplification import HIGH, ReadSimulation
from m4train.data.plan.balance import imbalance
from m4train.data.plan.left_out import left_out
from m4train.data.plan.mixture import source_size, weights_at
from m4train.data.plan.packing import Unit
from m4train.data.plan.plan import Plan, StepPlan
from m4train.data.source import Source, unread_line
from m4train.errors import ConfigError
from m4train.inspection.pages import render
from m4train.terminal import counted, stage

MOST_PLANNED_STEPS = 1000  # beyond them, the length of an epoch is carried on from the steps before


@dataclass
class SourceReport:
    """One source. Shares are fractions of what all sources give; `target` is the share of the unit the mixture counts in.

    `epoch_steps` is the step that trains the last of its samples for the first time, `epoch_estimated` whether that is
    beyond the planned steps; `epochs` how often the planned run goes through it. `read_amplification` is given for what is
    read in blocks: samples read for each one used. `left_out` samples of all fit no pack, however they are cut.
    """

    name: str
    samples: int
    tokens: int
    images: int
    target: float
    samples_share: float
    tokens_share: float
    images_share: float
    epoch_steps: int
    epoch_estimated: bool
    epochs: float
    dropped: dict[str, int] = field(default_factory=dict)
    not_read: str = ""  # the fields of its records that are not read
    read_amplification: float | None = None
    left_out: int = 0
    left_out_share: float = 0.0


@dataclass
class PlanReport:
    """The first `steps` steps of a run of `max_steps`. Numbers per step and per pack are means over them.

    `padding_fraction` and `frames_unused` are what is left of the two budgets of a pack; `binding` is the key of the
    one that is nearer to full, and `fullest` how full a pack is on average in the one it is fuller in. Imbalance is how
    much longer the slowest of `ranks` takes than the mean.
    """

    steps: int
    max_steps: int
    epoch_steps: int
    epoch_estimated: bool
    mixture_by: str
    packs_per_step: float
    documents_per_step: float
    tokens_per_step: float
    images_per_step: float
    frames_per_step: float
    padding_fraction: float
    frames_unused: float
    binding: str
    fullest: float
    ranks: int
    imbalance_mean: float
    imbalance_max: float
    sources: list[SourceReport]


class _Totals:
    """Sums over planned steps."""

    def __init__(self, plan: Plan, ranks: int, micro_batch_size: int) -> None:
        self._plan, self._ranks, self._micro = plan, ranks, micro_batch_size
        self.data = plan.data
        self.steps = self.packs = self.frames = self.documents = 0
        self.fullest = 0.0
        self.tokens: Counter[int] = Counter()  # by source, as are the others
        self.images: Counter[int] = Counter()
        self.dropped: dict[int, Counter[str]] = {number: Counter() for number in range(len(plan.sources))}
        self.targets = dict.fromkeys((source.name for source in plan.sources), 0.0)
        self.ended: dict[str, int] = {}  # the step that trains the last sample of the first epoch, by source
        self.imbalances: list[float] = []
        self.trained: dict[str, int] = {}  # samples that are in packs by now, or were dropped, by source
        self.reading = ReadSimulation(plan, ranks, micro_batch_size)

    def add(self, step: StepPlan) -> None:
        self.steps += 1
        self.packs += len(step.packs)
        budgets = self._plan.data.sequence_length, self._plan.data.images_per_pack
        self.fullest += sum(max(pack.tokens / budgets[0], pack.frames / budgets[1]) for pack in step.packs)
        for unit in (unit for pack in step.packs for unit in pack.units):
            self.documents += 1
            self.frames += unit.frames
            self.tokens[unit.source] += unit.tokens
            self.images[unit.source] += unit_images(self._plan.sources[unit.source], unit, self._plan.data)
        for dropped in step.dropped:
            self.dropped[dropped.source][dropped.reason] += 1
        costs = [pack.cost(self._plan.costs[0]) for pack in step.packs]
        self.imbalances.append(imbalance(costs, self._plan.shared(step.packs, self._ranks, self._micro)))
        weights = weights_at(step.step, self._plan.sources, self._plan.data.mixture)
        for name, weight in weights.items():
            self.targets[name] += weight / sum(weights.values())
        self.reading.add(step)
        for number, source in enumerate(self._plan.sources):
            cursor, held = step.state["streams"][source.name], _held(step.state, number)
            drawn = cursor["epoch"] * len(source) + cursor["position"]
            self.trained[source.name] = drawn - len(held)
            if drawn >= len(source) and all(epoch > 0 for epoch, _ in held):
                self.ended.setdefault(source.name, step.step)


def _held(state: dict[str, Any], source: int) -> set[tuple[int, int]]:
    """Epoch and number of the samples of a source that are drawn but not yet in a pack of a step, as a whole or in part."""
    waiting = [*state["pool"], *state["waiting"], *(unit for units in state["closed"] for unit in units)]
    return {(unit[2], unit[1]) for unit in waiting if unit[0] == source}


def plan_report(plan: Plan, max_steps: int, ranks: int, micro_batch_size: int) -> PlanReport:
    """Plans up to `max_steps` steps (at most `MOST_PLANNED_STEPS`) for `ranks` ranks. Raises ConfigError for a plan
    without a step."""
    if ranks < 1:
        raise ConfigError(f"ranks is {ranks}, but must be at least 1.")
    totals = _Totals(plan, ranks, micro_batch_size)
    stage("planning", "steps")
    planned = min(max_steps, MOST_PLANNED_STEPS)
    for step in islice(plan.steps(), planned):
        totals.add(step)
        counted(step.step, planned)
    if not totals.steps:
        raise ConfigError("data.sources hold nothing that can be packed: look at `m4train data stats`.")
    steps, data = totals.steps, plan.data
    tokens_left = 1 - totals.tokens.total() / (totals.packs * data.sequence_length)
    frames_left = 1 - totals.frames / (totals.packs * data.images_per_pack)
    sources = [_source_report(source, number, totals, max_steps) for number, source in enumerate(plan.sources)]
    return PlanReport(
        steps=steps,
        max_steps=max_steps,
        epoch_steps=max(source.epoch_steps for source in sources),
        epoch_estimated=any(source.epoch_estimated for source in sources),
        mixture_by=data.mixture.by,
        packs_per_step=totals.packs / steps,
        documents_per_step=totals.documents / steps,
        tokens_per_step=totals.tokens.total() / steps,
        images_per_step=totals.images.total() / steps,
        frames_per_step=totals.frames / steps,
        padding_fraction=tokens_left,
        frames_unused=frames_left,
        binding="data.sequence_length" if tokens_left <= frames_left else "data.images_per_pack",
        fullest=totals.fullest / totals.packs,
        ranks=ranks,
        imbalance_mean=sum(totals.imbalances) / steps,
        imbalance_max=max(totals.imbalances),
        sources=sources,
    )


def _source_report(source: Source, number: int, totals: _Totals, max_steps: int) -> SourceReport:
    name, steps = source.name, totals.steps
    lost = left_out(source, totals.data)
    trained = totals.trained[name]
    used = {other: count - totals.dropped[n].total() for n, (other, count) in enumerate(totals.trained.items())}
    return SourceReport(
        name=name,
        samples=len(source),
        tokens=source_size(source, "tokens"),
        images=source_size(source, "images"),
        target=totals.targets[name] / steps,
        samples_share=_share(used[name], sum(used.values())),
        tokens_share=_share(totals.tokens[number], totals.tokens.total()),
        images_share=_share(totals.images[number], totals.images.total()),
        epoch_steps=totals.ended.get(name) or -(-len(source) * steps // max(1, trained)),
        epoch_estimated=name not in totals.ended,
        epochs=trained / len(source) * max(1.0, max_steps / steps if steps == MOST_PLANNED_STEPS else 1.0),
        dropped=dict(totals.dropped[number]),
        not_read=unread_line(source),
        read_amplification=totals.reading.amplification().get(name),
        left_out=lost.lost,
        left_out_share=lost.fraction,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def unit_images(source: Source, unit: Unit, data: DataConfig) -> int:
    """Images of one planned segment."""
    where = source.locate(unit.sample)
    if unit.last < 0:
        return where.shard.image_count(where.number)
    return int((where.division(data).pieces.frames[unit.first : unit.last] > 0).sum())


def plan_tables(report: PlanReport) -> list[Any]:
    """The report as tables for a terminal."""
    from rich.table import Table

    totals = Table("the run", "", title=_title(report))
    for row in _total_rows(report).items():
        totals.add_row(*row)
    sources = Table("sources", title=f"mixed by {report.mixture_by}")
    for source in report.sources:
        sources.add_column(source.name, justify="right", overflow="fold")
    described = [_source_rows(source) for source in report.sources]
    for name in described[0]:
        sources.add_row(name, *(rows[name] for rows in described))
    high = [source.name for source in report.sources if (source.read_amplification or 0) > HIGH]
    advice = (
        f"{', '.join(high)}: more than {HIGH:g} samples are read for each one used; `m4train data convert` mends that"
    )
    return [totals, sources, *([advice] if high else [])]


def plan_page(name: str, report: PlanReport, said: list[str]) -> str:
    """The report as a page, with the sentences `said` of it."""
    shares = {
        "asked for": lambda source: source.target,
        "of samples": lambda source: source.samples_share,
        "of tokens": lambda source: source.tokens_share,
        "of images": lambda source: source.images_share,
    }
    sources = [
        {"name": one.name, "rows": _source_rows(one), "shares": [share(one) for share in shares.values()]}
        for one in report.sources
    ]
    about = {
        "title": f"{name}: the plan",
        "subtitle": _title(report),
        "mixture": report.mixture_by,
        "shares": list(shares),
    }
    return render("plan.html.j2", said=said, totals=_total_rows(report).items(), sources=sources, **about)


def _title(report: PlanReport) -> str:
    return f"plan of steps 1 to {report.steps:,} (of {report.max_steps:,})"


def _total_rows(report: PlanReport) -> dict[str, str]:
    about = "about " if report.epoch_estimated else ""
    return {
        "an epoch (every source seen once)": f"{about}{report.epoch_steps:,} steps",
        "packs a step": f"{report.packs_per_step:,.1f}",
        "documents a step": f"{report.documents_per_step:,.1f}",
        "tokens a step": f"{report.tokens_per_step:,.0f}",
        "images a step": f"{report.images_per_step:,.1f} ({report.frames_per_step:,.1f} frames)",
        "padding": f"{report.padding_fraction:.2%} of the tokens, {report.frames_unused:.2%} of the frames",
        "binding budget": f"{report.binding}; a pack is {report.fullest:.2%} full in the one that binds it",
        f"imbalance over {report.ranks} ranks": f"{report.imbalance_mean:.2%} (worst step {report.imbalance_max:.2%})",
    }


def _source_rows(source: SourceReport) -> dict[str, str]:
    epoch = f"{'about ' if source.epoch_estimated else ''}{source.epoch_steps:,} steps"
    return {
        "samples": f"{source.samples:,}",
        "tokens": f"{source.tokens:,}",
        "images": f"{source.images:,}",
        "an epoch": epoch,
        "epochs in the run": f"{source.epochs:.2f}",
        "share asked for": f"{source.target:.1%}",
        "share of samples": f"{source.samples_share:.1%}",
        "share of tokens": f"{source.tokens_share:.1%}",
        "share of images": f"{source.images_share:.1%}",
        "read for each used": f"{source.read_amplification:.1f}" if source.read_amplification else "1",
        "left out as too long": f"{source.left_out:,} ({source.left_out_share:.1%})" if source.left_out else "none",
        "passed over": ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items()) or "none",
        "fields not read": source.not_read or "none",
    }
