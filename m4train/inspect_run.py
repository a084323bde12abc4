"""What the commands do that look at a run without training: plan, preview, replay, validate."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console

from m4train import build
from m4train.config import Config
from m4train.data.plan import Plan
from m4train.data.source import build_sources
from m4train.inspection.plan_report import plan_report, plan_tables


def plan(config: Config, ranks: int, as_json: bool) -> int:
    """Prints the plan of the run of `config` on `ranks` ranks; returns 0."""
    trainer = config.trainer
    report = plan_report(_plan(config, _processor(config)), trainer.max_steps, ranks, trainer.micro_batch_size)
    _show(dataclasses.asdict(report), plan_tables(report), as_json)
    return 0


def _processor(config: Config) -> Any:
    build.prepare_data(config.data)
    return build.build_processor(config)


def _plan(config: Config, processor: Any) -> Plan:
    sources = build_sources(config.data.sources, config.data, processor)
    return Plan(sources, config.data, config.seed, config.trainer.global_batch_size)


def _show(report: dict[str, Any], tables: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=1))
        return
    console = Console()
    for table in tables:
        console.print(table)
