"""The curves of one run: losses, gradient norms, what was left out, throughput."""

from __future__ import annotations

import statistics

from markupsafe import Markup

from m4train.inspection.charts import Line, line_chart
from m4train.run_files import RunFiles

STEP = "optimizer step"
_NORM = "grad_norm/"


def stage_charts(run: RunFiles) -> list[dict[str, str | Markup]]:
    """Title and SVG of every curve the run has points for."""
    charts = [
        ("loss", line_chart(_losses(run), STEP, "loss per token", log=True)),
        ("loss by source", line_chart(_by_source(run), STEP, "loss per token", log=True)),
        ("benchmarks", line_chart(_benchmarks(run), STEP, "score")),
        ("gradient norm before clipping", line_chart(_norms(run), STEP, "norm", log=True)),
        ("tokens per second", line_chart([Line("tokens/s", run.series("tokens_per_second"))], STEP, "tokens/s")),
        ("skipped steps and dropped samples", line_chart(_left_out(run), STEP, "since the start")),
    ]
    return [{"title": title, "svg": Markup(svg)} for title, svg in charts if svg]


def _losses(run: RunFiles) -> list[Line]:
    held_out = [
        Line(f"held out: {name}", run.series(f"eval/loss/{name}"), dots=True) for name in run.config.data.validation
    ]
    return [Line("training", smooth(run.series("loss"))), *held_out]


def _by_source(run: RunFiles) -> list[Line]:
    """One line per source of the mixture; none if there is only one, whose line is the loss."""
    sources = list(run.config.data.sources)
    return [Line(name, smooth(run.series(f"loss/{name}"))) for name in sources] if len(sources) > 1 else []


def _benchmarks(run: RunFiles) -> list[Line]:
    """The scores while it trained, and those of a job that followed it."""
    prefix = "eval/benchmark/"
    names = sorted({key.removeprefix(prefix) for row in run.metrics for key in row if key.startswith(prefix)})
    lines = [Line(name, run.series(prefix + name), dots=True) for name in names]
    followed: dict[str, list[tuple[float, float]]] = {}
    for row in run.followed:
        if isinstance(row.get("value"), (int, float)):
            followed.setdefault(f"{row.get('benchmark')}, {row.get('count')} samples", []).append(
                (row["step"], row["value"])
            )
    lines += [Line(name, sorted(points), dots=True) for name, points in sorted(followed.items())]
    return [*lines, *([Line("weighted", run.series("eval/benchmarks"), dots=True)] if len(names) > 1 else [])]


def _norms(run: RunFiles) -> list[Line]:
    parts = {key.removeprefix(_NORM) for row in run.metrics for key in row if key.startswith(_NORM)}
    lines = [Line(part, run.series(_NORM + part)) for part in sorted(parts)]
    return [Line("total", run.series("grad_norm")), *(lines if len(lines) > 1 else [])]


def _left_out(run: RunFiles) -> list[Line]:
    """Counts that only grow; nothing if nothing was left out."""
    lines = [Line("skipped steps", run.series("skipped_steps")), Line("dropped samples", run.series("quarantined"))]
    return [line for line in lines if any(value for _, value in line.points)]


def smooth(points: list[tuple[float, float]], window: int = 3) -> list[tuple[float, float]]:
    """A running mean over up to `window` logged steps before each point, so that a curve can be read."""
    return [
        (step, statistics.fmean(value for _, value in points[max(0, number - window + 1) : number + 1]))
        for number, (step, _) in enumerate(points)
    ]
