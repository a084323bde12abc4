"""The curves of one run, or of several laid over each other: losses, rates, gradient norms, what was left out, throughput."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from m4train.inspection.charts import Line, line_chart
from m4train.run_files import RunFiles

STEP = "optimizer step"
_SHOWN = (  # title, keys of metrics.jsonl (a key that ends in / stands for all that begin so), label, logarithmic
    ("loss", ("loss", "eval/loss/", "eval/loss"), "loss per token", True),
    ("loss by source", ("loss/",), "loss per token", True),
    ("benchmarks", ("eval/benchmark/", "eval/benchmarks"), "score", False),
    ("learning rate", ("lr", "lr/"), "rate", False),
    ("gradient norm before clipping", ("grad_norm", "grad_norm/"), "norm", True),
    ("tokens per second", ("tokens_per_second",), "tokens/s", False),
    ("waiting for data and padding", ("data_wait_fraction", "padding_fraction"), "share", False),
    ("memory", ("memory_gib",), "GiB", False),
    ("skipped steps and dropped samples", ("skipped_steps", "quarantined"), "since the start", False),
    ("left out as too long", ("too_long/",), "share of the documents", False),
)
_NAMES = {
    "loss": "training",
    "eval/loss": "held out",
    "eval/benchmarks": "weighted",
    "grad_norm": "total",
    "lr": "all",
    "tokens_per_second": "tokens/s",
    "data_wait_fraction": "waiting",
    "padding_fraction": "padding",
    "memory_gib": "largest",
    "skipped_steps": "skipped steps",
    "quarantined": "dropped samples",
}
_COUNTS = ("skipped_steps", "quarantined", "too_long/", "data_wait_fraction", "padding_fraction", "memory_gib")


def stage_charts(runs: Sequence[RunFiles]) -> list[dict[str, str | Markup]]:
    """Title and figure of every curve the runs have points for; of several runs, named after their folders."""
    found = []
    for title, keys, label, log in _SHOWN:
        lines = [line for run in runs for line in _lines(run, keys, f"{run.folder.name} " if len(runs) > 1 else "")]
        lines += [line for run in runs for line in _followed(run)] if title == "benchmarks" else []
        if figure := line_chart(lines, STEP, label, log):
            found.append({"title": title, "svg": Markup(figure)})
    return found


def _lines(run: RunFiles, keys: Sequence[str], before: str) -> Iterator[Line]:
    logged = list(dict.fromkeys(key for row in run.metrics for key in row))
    for key in keys:
        names = [name for name in logged if name.startswith(key)] if key.endswith("/") else [key]
        if key.endswith("/") and len(names) < 2 and not key.startswith(("eval", "too_long")):
            continue  # of one part or source alone, which the sum shows already
        if key == "eval/loss" and any(name.startswith("eval/loss/") for name in logged):
            continue
        if key == "eval/benchmarks" and sum(name.startswith("eval/benchmark/") for name in logged) < 2:
            continue
        for name in names:
            points = run.series(name)
            if key in _COUNTS and not any(value for _, value in points):
                continue  # nothing was left out
            held_out = name.startswith("eval/")
            shown = f"held out: {name.removeprefix(key)}" if key == "eval/loss/" else name.removeprefix(key)
            shown = _NAMES.get(name, shown)
            yield Line(before + shown, smooth(points) if name.startswith("loss") else points, dots=held_out)


def _followed(run: RunFiles) -> Iterator[Line]:
    """The scores of a job that followed the run."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in run.followed:
        if isinstance(row.get("value"), (int, float)):
            name = f"{row.get('benchmark')}, {row.get('count')} samples"
            found.setdefault(name, []).append((row["step"], row["value"]))
    return (Line(name, sorted(points), dots=True) for name, points in sorted(found.items()))


def smooth(points: list[tuple[float, float]], window: int = 3) -> list[tuple[float, float]]:
    """A running mean over up to `window` logged steps before each point, so that a curve can be read."""
    return [
        (step, statistics.fmean(value for _, value in points[max(0, number - window + 1) : number + 1]))
        for number, (step, _) in enumerate(points)
    ]
