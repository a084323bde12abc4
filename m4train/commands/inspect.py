"""What the commands do that look at a run without training: plan, preview, replay, validate, bench, report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from m4train import build
from m4train.config import Config
from m4train.config.trust import code_named
from m4train.data.loading.collate import Collator
from m4train.data.plan.left_out import above_limit, left_out, left_out_lines
from m4train.data.plan.lengths import settled
from m4train.data.plan.plan import PlannedPack
from m4train.data.source import open_sources
from m4train.inspection.bench import bench as measure
from m4train.inspection.bench import bench_tables
from m4train.inspection.pages import write
from m4train.inspection.plan_report import plan_page, plan_report, plan_tables
from m4train.inspection.preview import PackView, view_pack, write_page
from m4train.inspection.replay import (
    logged_hash,
    neighbours,
    planned_step,
    replay_table,
    replayed_samples,
    step_hash,
    stored_config,
)
from m4train.inspection.report import write_report
from m4train.inspection.token_losses import nearest_checkpoint, scored_pack, token_losses
from m4train.inspection.validate import validate_source, validation_tables
from m4train.restore import restore_model
from m4train.run_files import PREVIEW, read_run, replay_page
from m4train.terminal import console, counted, fitted, progress, stage


def plan(config: Config, ranks: int, as_json: bool, page: str | None = None) -> int:
    """Prints the plan of the run of `config` on `ranks` ranks, and writes it as a page if asked to; returns 1 if the run would stop for what it leaves out, else 0."""
    processor, data = build.prepared_processor(config), config.data
    planned = build.build_plan(config, processor)
    trainer = settled(config, lambda: planned).trainer
    report = plan_report(planned, trainer.max_steps, ranks, trainer.micro_batch_size)
    held_out = {name: source for name, source in build.all_sources(data).items() if name not in data.sources}
    found = [left_out(source, data) for source in (*planned.sources, *open_sources(held_out, data, processor))]
    stops = above_limit(found, data)
    said = [*left_out_lines(found), *([f"the run would stop before training: {stops}"] if stops else [])]
    if page is not None:
        write(Path(page), plan_page(config.name, report, said))
        said.append(f"page: {page}")
    show(dataclasses.asdict(report) | {"stops": stops}, [*plan_tables(report), *said], as_json)
    return 1 if stops else 0


def validate(config: Config, workers: int, as_json: bool) -> int:
    """Reads every sample of all sources, held-out ones too, and prints what is wrong with them.

    Returns 1 if a source has a larger share of bad samples than data.max_bad_fraction, or no good one, or if a run would stop
    for what it leaves out as too long (data.max_dropped_fraction).
    """
    processor, data = build.prepared_processor(config), config.data
    found = []
    with progress("samples") as bars:
        for source in open_sources(build.all_sources(data), data, processor):
            task = bars.add_task(source.name, total=len(source))
            advance = lambda done, task=task: bars.update(task, completed=done)
            found.append(validate_source(source, data, processor, workers, advance))
    failed = [
        source.name for source in found if source.bad_fraction > data.max_bad_fraction or source.bad == source.samples
    ]
    stops = above_limit([source.too_long for source in found if source.too_long is not None], data)
    report = {"max_bad_fraction": data.max_bad_fraction, "failed": failed, "stops": stops}
    report["sources"] = {source.name: source.report() for source in found}
    limit = f"data.max_bad_fraction={data.max_bad_fraction}"
    verdict = f"more bad samples than {limit}: {', '.join(failed)}" if failed else f"no source exceeds {limit}"
    too_long = [f"a run would stop before training: {stops}"] if stops else []
    show(report, [*validation_tables(found), verdict, *too_long], as_json)
    return 1 if failed or stops else 0


def bench(config: Config, packs: int, as_json: bool) -> int:
    """Prints how fast the data side of the run of `config` is, measured on its first `packs` packs; returns 0."""
    processor = build.prepared_processor(config)
    layout, micro = build.build_layout(config, processor), config.trainer.micro_batch_size
    stage("measuring")
    report = measure(build.build_plan(config, processor), processor, config.data, config.seed, micro, layout, packs)
    show(dataclasses.asdict(report), bench_tables(report), as_json)
    return 0


def preview(config: Config, packs: int) -> int:
    """Writes run_dir/preview.html, the first `packs` packs of the run as the model sees them; returns 0."""
    path = Path(config.run_dir) / PREVIEW
    views = first_packs(config, packs)
    write_page(path, f"{config.name}: the first packs", f"{len(views)} packs of seed {config.seed}", views)
    stage(None)
    print(f"preview: {path}")
    return 0


def first_packs(config: Config, packs: int) -> list[PackView]:
    """The first `packs` packs of the run, built exactly as training does."""
    processor = build.prepared_processor(config)
    plan = build.build_plan(config, processor)
    collator = Collator(plan.sources, processor, config.data, config.seed)
    first = islice((pack for step in plan.steps() for pack in step.packs), packs)
    stage("building packs", "packs")
    views = []
    for pack in first:
        views.append(view_pack(collator, pack))
        counted(len(views), packs)
    return views


def replay(config: Config, step: int, as_json: bool, losses: bool = True) -> int:
    """Prints every sample of one step of a run and writes it as run_dir/replay-step-N.html, with the loss of every document and
    token by the checkpoint nearest before it.

    Returns 1 if the step was logged with another data_hash, which means that the data is no longer what it was.
    """
    run_dir = Path(config.run_dir)
    config = stored_config(run_dir, step, code_named(config))
    processor = build.prepared_processor(config)
    plan = build.build_plan(config, processor)
    collator = Collator(plan.sources, processor, config.data, config.seed)
    stage(f"building step {step} again")
    planned = planned_step(plan, step, run_dir).packs
    packs = [view_pack(collator, pack) for pack in planned]
    by = "not asked for"
    if losses:
        packs, by = with_losses(config, packs, planned, collator, step)
    samples = replayed_samples(collator, packs)
    found, logged = step_hash(collator, packs), logged_hash(read_run(run_dir).metrics, step)
    verdict = "not logged" if logged is None else "same" if found == logged else f"differs from the logged {logged}"
    path = run_dir / replay_page(step)
    said = f"{len(samples)} documents, data_hash {found} ({verdict}); losses: {by}"
    write_page(path, f"{config.name}: step {step}", said, packs, neighbours(run_dir, step))
    report = {"step": step, "data_hash": found, "logged_data_hash": logged, "page": str(path), "losses": by}
    report["samples"] = [dataclasses.asdict(sample) for sample in samples]
    show(
        report,
        [replay_table(step, samples), f"data_hash {found}: {verdict}", f"losses: {by}", f"page: {path}"],
        as_json,
    )
    return 0 if logged in (None, found) else 1


def with_losses(
    config: Config, packs: list[PackView], planned: Sequence[PlannedPack], collator: Collator, step: int
) -> tuple[list[PackView], str]:
    """The packs with the loss of every document and token, and by which weights; without, if there is no checkpoint."""
    folder = nearest_checkpoint(Path(config.run_dir), step)
    if folder is None:
        return packs, "none, since the run holds no checkpoint"
    stage(f"computing losses by {folder.name}", "packs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = restore_model(config, folder).to(device)
    layout = build.build_layout(config, collator.processor)
    batches = Collator(collator.sources, collator.processor, config.data, config.seed, layout)
    found = []
    for view, pack in zip(packs, planned, strict=True):
        found.append(scored_pack(view, token_losses(model, batches, pack, step, device), collator.processor))
        counted(len(found), len(packs))
    return found, f"by {folder.name}"


def report(config: Config) -> int:
    """Writes run_dir/report.html; returns 0."""
    stage("reading the run")
    print(f"report: {write_report(config)}")
    return 0


def show(report: dict[str, Any], tables: list[Any], as_json: bool) -> None:
    stage(None)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    shown = console()
    for table in tables:
        for part in fitted(table, shown.width) if isinstance(table, Table) else [table]:
            shown.print(part)
