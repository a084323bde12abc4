"""`m4train report`: one HTML file about a run and the runs before it, readable offline."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

import m4train
from m4train.config import Config
from m4train.inspection.charts import Line, line_chart
from m4train.inspection.run_files import RunFiles, lineage

SHOWN_ANSWERS = 24


def write_report(config: Config) -> Path:
    """Writes `run_dir/report.html` and returns its path; raises DataError where run_dir holds no run."""
    runs = lineage(Path(config.run_dir))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.j2").render(_page(runs))
    path = Path(config.run_dir) / "report.html"
    path.write_text(page)
    return path


def _page(runs: list[RunFiles]) -> dict[str, Any]:
    run = runs[-1]
    answers = _shown(run.answers)
    return {
        "title": run.name.replace("_", " "),
        "subtitle": " then ".join(_one_line(each) for each in runs),
        "tiles": _tiles(runs),
        "stages": [_stage(each) for each in runs],
        "answers": answers,
        "answers_note": _answers_note(run, answers),
        "version": m4train.__version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _one_line(run: RunFiles) -> str:
    adapter = "" if run.config.adapter.kind == "none" else f" with {run.config.adapter.kind}"
    steps = run.metrics[-1]["step"] if run.metrics else 0
    return f"{run.name}: {steps:,} steps{adapter}, {run.config.engine.name}, {run.config.trainer.precision}"


def _tiles(runs: list[RunFiles]) -> list[dict[str, str]]:
    run = runs[-1]
    tiles = [
        {
            "value": f"{100 * result[result['metric']]:.1f} %",
            "name": f"{name}: {result['metric'].replace('_', ' ')} on {result['count']:,} held-out",
        }
        for name, result in run.evaluation.items()
        if "metric" in result
    ]
    if run.parameters:
        tiles.append({"value": _short(run.parameters[-1]["parameters"]), "name": "parameters"})
    tiles.append({"value": _short(sum(_total(each, "tokens") for each in runs)), "name": "tokens trained on"})
    tiles.append({"value": _short(sum(_total(each, "images") for each in runs)), "name": "images trained on"})
    return tiles


def _stage(run: RunFiles) -> dict[str, Any]:
    trained = run.parameters[-1] if run.parameters else None
    loss = [Line("training", _smooth(run.series("loss")))]
    loss += [
        Line(f"held out: {name}", run.series(f"eval/loss/{name}"), dots=True) for name in run.config.data.validation
    ]
    return {
        "name": run.name,
        "run_dir": str(run.folder),
        "loss_chart": Markup(line_chart(loss, "optimizer step", "loss per token", log=True)),
        "speed_chart": Markup(
            line_chart([Line("tokens/s", run.series("tokens_per_second"))], "optimizer step", "tokens/s")
        ),
        "trained_note": f"{trained['trainable']:,} of {trained['parameters']:,} parameters train" if trained else "",
        "parts": [_part(row) for row in run.parameters],
        "steps": f"{run.metrics[-1]['step']:,}" if run.metrics else "0",
        "tokens": f"about {_short(_total(run, 'tokens'))}",
        "images": f"about {_short(_total(run, 'images'))}",
        "speed": _median(run, "tokens_per_second", "{:,.0f}"),
        "wait": _median(run, "data_wait_fraction", "{:.1%}"),
        "padding": _median(run, "padding_fraction", "{:.2%}"),
        "skipped": f"{_last(run, 'skipped_steps'):,}",
        "dropped": f"{run.quarantined:,}",
    }


def _part(row: dict[str, Any]) -> dict[str, str]:
    return {
        "part": row["part"],
        "parameters": f"{row['parameters']:,}",
        "trainable": f"{row['trainable']:,}",
        "adapters": f"{row['adapted']:,}" if row["adapted"] else "",
        "share": f"{row['trainable'] / row['parameters']:.1%}" if row["parameters"] else "",
        "dtype": ", ".join(row["storage"]),
        "rate": f"{row['lr']:g}" if row["lr"] else "",
        "decay": " / ".join(f"{decay:g}" for decay in row["decay"]),
    }


def _shown(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers with images, wrong ones first but at most a third of those shown, the rest spread over all questions."""
    drawn = [answer for answer in answers if answer.get("images")]
    wrong = [answer for answer in drawn if answer["score"] < 1][: SHOWN_ANSWERS // 3]
    right = [answer for answer in drawn if answer["score"] == 1]
    room = SHOWN_ANSWERS - len(wrong)
    stride = max(1, len(right) // room)
    return right[::stride][:room] + wrong


def _answers_note(run: RunFiles, shown: list[dict[str, Any]]) -> str:
    wrong = sum(answer["score"] < 1 for answer in run.answers)
    if not shown:
        return ""
    return f"{len(run.answers):,} questions were asked, {wrong:,} answered wrongly. Shown are {len(shown)}, the wrong ones last."


def _total(run: RunFiles, key: str) -> int:
    """What a run took in of a count that is logged for single steps: the mean of the logged ones times all steps."""
    values = [value for _, value in run.series(key)]
    return round(statistics.fmean(values) * run.metrics[-1]["step"]) if values else 0


def _last(run: RunFiles, key: str) -> int:
    return int(run.metrics[-1].get(key, 0)) if run.metrics else 0


def _median(run: RunFiles, key: str, form: str) -> str:
    values = [value for _, value in run.series(key)]
    return form.format(statistics.median(values)) if values else "–"


def _smooth(points: list[tuple[float, float]], window: int = 3) -> list[tuple[float, float]]:
    """A running mean over up to `window` logged steps before each point, so that a curve can be read."""
    return [
        (step, statistics.fmean(value for _, value in points[max(0, number - window + 1) : number + 1]))
        for number, (step, _) in enumerate(points)
    ]


def _short(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:g}"
