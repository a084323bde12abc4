"""Several runs next to each other: a table of what differs and how they ended, and one page of curves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf
from rich.table import Table

from m4train.config.require import leaves
from m4train.errors import ConfigError
from m4train.inspection.charts import Line, line_chart
from m4train.inspection.pages import render
from m4train.inspection.stage_charts import STEP, stage_charts
from m4train.run_files import RunFiles, read_run

_OF_A_RUN = ("name", "run_dir")  # keys that differ between any two runs


@dataclass(frozen=True)
class Compared:
    """One run: the keys that differ, its last step, and the last and best (smallest, or largest for `max`) value of the metric."""

    run: str
    differs: dict[str, Any]
    step: int
    last: float | None
    best: float | None


def compare(folders: list[Path], metric: str, mode: str, must: bool = True) -> tuple[list[Compared], list[RunFiles]]:
    """The runs sorted by their best value, best first, those without one last. Raises ConfigError if no run logs the metric, though
    one `must`, DataError for a folder that holds no run."""
    runs = [read_run(folder) for folder in folders]
    flat = [dict(leaves(OmegaConf.to_container(run.config))) for run in runs]
    keys = sorted({key for one in flat for key in one})
    differ = [key for key in keys if key not in _OF_A_RUN and len({json.dumps(one.get(key)) for one in flat}) > 1]
    found = []
    for run, values in zip(runs, flat, strict=True):
        logged = [row[metric] for row in run.metrics if isinstance(row.get(metric), (int, float))]
        best = (max if mode == "max" else min)(logged) if logged else None
        step = int(run.metrics[-1]["step"]) if run.metrics else 0
        differs = {key: values.get(key) for key in differ}
        found.append((Compared(str(run.folder), differs, step, logged[-1] if logged else None, best), run))
    if must and all(one.best is None for one, _ in found):
        known = sorted(
            {key for run in runs for row in run.metrics for key in row if isinstance(row[key], (int, float))}
        )
        raise ConfigError(f"no run logs {metric}; they log {', '.join(known) or 'nothing yet'}: name one by --metric.")
    sign = -1.0 if mode == "max" else 1.0
    found.sort(key=lambda pair: math.inf if pair[0].best is None else sign * pair[0].best)
    return [one for one, _ in found], [run for _, run in found]


def compare_table(found: list[Compared], metric: str) -> Table:
    table = Table(title=f"runs by {metric}")
    table.add_column("run", overflow="fold")
    for key in found[0].differs:
        table.add_column(key, overflow="fold")
    for name in ("step", "last", "best"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        values = [str(value) for value in one.differs.values()]
        table.add_row(one.run, *values, f"{one.step:,}", _number(one.last), _number(one.best))
    return table


def compare_page(found: list[Compared], runs: list[RunFiles], metric: str, live: str = "") -> str:
    """The table and the curves of all runs over each other."""
    rows = [
        [one.run, *map(str, one.differs.values()), f"{one.step:,}", _number(one.last), _number(one.best)]
        for one in found
    ]
    charts = stage_charts(runs)
    lines = [Line(run.folder.name, run.series(metric), dots=metric.startswith("eval/")) for run in runs]
    if metric != "loss" and (figure := line_chart(lines, STEP, metric)):
        charts.insert(0, {"title": metric, "svg": Markup(figure)})
    head = ["run", *found[0].differs, "step", "last", "best"]
    about = {"title": f"Runs by {metric}", "subtitle": "What differs between them, and how they went."}
    return render("compare.html.j2", live=live, head=head, rows=rows, charts=charts, **about)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"
