"""`m4train replay`: every sample of one optimizer step of a run, from its directory alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4train.config import Config, compose
from m4train.config.trust import check_code
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan, StepPlan
from m4train.errors import BadSample, ConfigError, DataError
from m4train.inspection.preview import PackView, SegmentView
from m4train.json_lines import OF_A_STEP, read_lines
from m4train.run_files import CHECKPOINTS, CONFIG, CURSORS, STARTS, STATE, load_yaml, replay_page
from m4train.training.starts import config_at

_MODULUS = 1 << 64


@dataclass(frozen=True)
class ReplayedSample:
    """One segment of the step. `byte_ranges` are [offset, size] of its texts and then of its images in `shard`, in the
    units of the source's format; `pieces` is [first, last) if a longer document was cut; `span` is [begin, end) in the
    tokens of its pack, and `trained` the stretches of it that are trained on."""

    pack: int
    source: str
    key: str
    shard: str
    byte_ranges: list[list[int]]
    url: str
    epoch: int
    pieces: list[int] | None
    span: list[int]
    trained: list[list[int]]
    loss_tokens: int
    images: int
    dropped: str
    loss: float | None = None  # mean over its loss tokens, by the weights of a checkpoint


def stored_config(run_dir: Path, step: int, known: Mapping[str, str] | None = None) -> Config:
    """The configuration that step `step` of a run was made with; code that it names has to be `known`, see `check_code`.
    Raises DataError if the directory holds none, or one that cannot be read."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise DataError(f"{run_dir} holds no config.yaml: set run_dir to the directory of a run.")
    try:
        config = compose.stored_config(config_at(run_dir, step) or load_yaml(path), path)
        check_code(config, run_dir / STARTS, (), compose.resource_folder("conf"), known or {})
        return config
    except ConfigError as error:
        raise DataError(str(error)) from error


def planned_step(plan: Plan, step: int, run_dir: Path) -> StepPlan:
    """Step `step`, planned from the nearest logged cursor before it, or from the beginning. Raises ConfigError if the plan
    ends earlier."""
    for planned in plan.steps(nearest_state(run_dir, step)):
        if planned.step == step:
            return planned
    raise ConfigError(f"step={step} is beyond the end of the data of {run_dir}: choose an earlier one.")


def nearest_state(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The latest state of the plan before `step` that cursors.jsonl or a checkpoint holds; None if there is none."""
    checkpoints = (run_dir / CHECKPOINTS).glob(f"step-*/{STATE}")
    states = [_plan_of(path) for path in checkpoints] + read_lines(run_dir / CURSORS, OF_A_STEP)
    return max((s for s in states if s and s["step"] < step), key=lambda s: s["step"], default=None)


def _plan_of(path: Path) -> dict[str, Any] | None:
    """The state of the plan in a checkpoint's state.json; None if that is damaged."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return plan if isinstance(plan, dict) and type(plan.get("step")) is int else None


def neighbours(run_dir: Path, step: int) -> list[tuple[str, str]]:
    """What is called the step before and the one after, and links to their pages, if they were made."""
    found = []
    for name, number in (("step before", step - 1), ("step after", step + 1)):
        if number > 0:
            page = replay_page(number)
            made = (run_dir / page).is_file()
            shown = f"{name}: {number}" if made else f"{name}: m4train replay --step {number} run_dir={run_dir}"
            found.append((shown, page if made else ""))
    return found


def step_hash(collator: Collator, packs: Sequence[PackView]) -> str:
    """The `data_hash` of a step with these packs, as metrics.jsonl has it."""
    total = sum(
        collator.document_hash(segment.unit, pack.number, b"dropped" if segment.problem else b"used")
        for pack in packs
        for segment in pack.segments
    )
    return f"{total % _MODULUS:016x}"


def logged_hash(metrics: Sequence[dict[str, Any]], step: int) -> str | None:
    """The data_hash last logged for `step`; None if it was not logged."""
    found = [row["data_hash"] for row in metrics if row.get("step") == step and "data_hash" in row]
    return found[-1] if found else None


def replayed_samples(collator: Collator, packs: Sequence[PackView]) -> list[ReplayedSample]:
    """Where every segment of the packs came from."""
    return [_sample(collator, pack, segment) for pack in packs for segment in pack.segments]


def _sample(collator: Collator, pack: PackView, segment: SegmentView) -> ReplayedSample:
    unit, where = segment.unit, collator.locate(segment.unit)
    try:
        url = str(where.source.read(unit.sample).source.get("url", ""))
    except BadSample:
        url = ""
    return ReplayedSample(
        pack=pack.number,
        source=segment.source,
        key=segment.key,
        shard=segment.shard,
        byte_ranges=[[member.offset, member.size] for member in where.members],
        url=url,
        epoch=unit.epoch,
        pieces=None if unit.last < 0 else [unit.first, unit.last],
        span=[segment.begin, segment.end],
        trained=trained_spans(segment),
        loss_tokens=segment.loss_tokens,
        images=segment.images,
        dropped=segment.problem,
        loss=segment.loss,
    )


def trained_spans(segment: SegmentView) -> list[list[int]]:
    """[begin, end) of every span of trained tokens, in the tokens of the pack."""
    spans: list[list[int]] = []
    begin = segment.begin
    for span in segment.spans:
        if span.kind == "trained":
            spans.append([begin, begin + span.tokens])
        begin += span.tokens
    return spans


def replay_table(step: int, samples: Sequence[ReplayedSample]) -> Any:
    """The samples as a table for a terminal, those of the largest loss first."""
    from rich.table import Table

    table = Table("pack", "source", title=f"step {step}")
    urls = any(sample.url for sample in samples)
    for name in ("key", "shard", "bytes", *(["url"] if urls else [])):
        table.add_column(name, overflow="fold")
    losses = any(sample.loss is not None for sample in samples)
    for name in ("span", "trained", "images", *(["loss"] if losses else [])):
        table.add_column(name, justify="right")
    for sample in sorted(samples, key=lambda sample: -1.0 if sample.loss is None else sample.loss, reverse=losses):
        begin = min((offset for offset, _ in sample.byte_ranges), default=0)
        end = max((offset + size for offset, size in sample.byte_ranges), default=0)
        span = "dropped" if sample.dropped else f"{sample.span[0]}-{sample.span[1]}"
        shard = sample.shard.rsplit("/", 1)[-1]
        counts = [span, str(sample.loss_tokens), str(sample.images)]
        counts += ["" if sample.loss is None else f"{sample.loss:.4f}"] * losses
        where = (sample.key, shard, f"{begin}-{end}", *([sample.url] if urls else []))
        table.add_row(str(sample.pack), sample.source, *where, *counts)
    return table
