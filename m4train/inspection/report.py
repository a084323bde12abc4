"""`m4train report`: one HTML file about a run and the runs before it, readable offline."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from m4train.config import Config
from m4train.inspection.pages import render, write
from m4train.inspection.stage_charts import stage_charts
from m4train.run_files import REPORT, RunFiles, lineage, shown_score, whole_of

SHOWN_ANSWERS = 24
SHOWN_KEYS = 6  # of dropped samples, per reason
SHOWN_STEPS = 4  # of the answers given while a run trained


def write_report(config: Config) -> Path:
    """Writes `report.html` into run_dir, or into the folder of the whole if it is a stage, and returns its path; raises
    DataError if run_dir holds no run."""
    path = whole_of(Path(config.run_dir)) / REPORT
    write(path, report_page(Path(config.run_dir)))
    return path


def report_page(run_dir: Path, live: str = "") -> str:
    """The page about a run and the runs before it; `live` is the state of its files, if it is served while it trains."""
    return render("report.html.j2", live=live, **_page(lineage(run_dir)))


def answers_page(scores: dict[str, dict[str, Any]], answers: list[dict[str, Any]]) -> str:
    """The answers of an evaluation, and its scores."""
    shown = _shown(answers)
    rows = [_score(name, result) for name, result in scores.items()]
    note = _answers_note(answers, shown)
    return render("answers_page.html.j2", title="Evaluation", answers=shown, scores=rows, answers_note=note)


def _page(runs: list[RunFiles]) -> dict[str, Any]:
    run = runs[-1]
    answers = _shown(run.answers)
    return {
        "title": run.name.replace("_", " "),
        "subtitle": " then ".join(_one_line(each) for each in runs),
        "tiles": _tiles(runs),
        "stages": [_stage(each) for each in runs],
        "answers": answers,
        "scores": [_score(name, result) for name, result in run.evaluation.items()],
        "answers_note": _answers_note(run.answers, answers),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _score(source: str, result: dict[str, Any]) -> dict[str, str]:
    """A row of the evaluation table."""
    metric = result.get("metric")
    return {
        "source": source,
        "loss": f"{result['loss']:.4f}" if "loss" in result else "–",
        "metric": metric.replace("_", " ") if metric else "–",
        "score": shown_score(result) if metric else "–",
        "count": f"{result['count']:,}" if metric else "–",
        "unreadable": f"{result.get('unreadable', 0):,}",
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
    return {
        "name": run.name,
        "run_dir": str(run.folder),
        "charts": stage_charts([run]),
        "too_long": _too_long(run),
        "sequence_length": f"{run.config.data.sequence_length:,}",
        "quarantine": [_reason(reason, keys) for reason, keys in _by_reason(run.quarantine).items()],
        "samples": _samples(run.samples),
        "trained_note": f"{trained['trainable']:,} of {trained['parameters']:,} parameters train" if trained else "",
        "parts": [_part(row) for row in run.parameters],
        "steps": f"{run.metrics[-1]['step']:,}" if run.metrics else "0",
        "tokens": f"about {_short(_total(run, 'tokens'))}",
        "images": f"about {_short(_total(run, 'images'))}",
        "speed": _median(run, "tokens_per_second", "{:,.0f}"),
        "wait": _median(run, "data_wait_fraction", "{:.1%}"),
        "padding": _median(run, "padding_fraction", "{:.2%}"),
        "expected": _expected(run),
        "skipped": f"{_last(run, 'skipped_steps'):,}",
        "dropped": f"{len(run.quarantine):,}",
    }


def _expected(run: RunFiles) -> str:
    """How memory and time were against what the run expected at its start."""
    said = []
    for key, unit in (("memory_gib", "GiB of tensors per rank at the peak"), ("seconds_per_step", "s per step")):
        expected, measured = run.series(f"expected/{key}"), run.series(f"measured/{key}")
        if expected and measured and expected[-1][1]:
            off = measured[-1][1] / expected[-1][1] - 1
            said.append(f"{measured[-1][1]:.3g} {unit}, {off:+.1%} of what was expected")
    return "; ".join(said)


def _by_reason(quarantine: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in quarantine:
        found.setdefault(entry["reason"], []).append(f"{entry['source']}: {entry['key']}")
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _reason(reason: str, keys: list[str]) -> dict[str, str]:
    more = f" and {len(keys) - SHOWN_KEYS:,} more" if len(keys) > SHOWN_KEYS else ""
    return {"reason": reason.replace("_", " "), "count": f"{len(keys):,}", "keys": ", ".join(keys[:SHOWN_KEYS]) + more}


def _too_long(run: RunFiles) -> list[dict[str, str]]:
    """The share of each source that was left out for its length, if there was any."""
    last = run.metrics[-1] if run.metrics else {}
    named = {key.removeprefix("too_long/"): value for key, value in last.items() if key.startswith("too_long/")}
    return [{"source": name, "share": f"{share:.2%}"} for name, share in named.items() if share]


def _samples(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions at several moments of a run: a row per question, what was answered at each of some steps."""
    steps = sorted({line["step"] for line in lines})
    chosen = (
        steps
        if len(steps) <= SHOWN_STEPS
        else [steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    )
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        row = rows.setdefault((line["source"], line["key"]), {**line, "said": {}})
        row["said"][line["step"]] = line
    return [{**row, "said": [(step, row["said"].get(step)) for step in chosen]} for row in rows.values()]


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


def _answers_note(answers: list[dict[str, Any]], shown: list[dict[str, Any]]) -> str:
    wrong = sum(answer["score"] < 1 for answer in answers)
    if not shown:
        return ""
    return f"{len(answers):,} questions were asked, {wrong:,} answered wrongly. Shown are {len(shown)}, the wrong ones last."


def _total(run: RunFiles, key: str) -> int:
    """What a run took in of a count that is logged for single steps: the mean of the logged ones times all steps."""
    values = [value for _, value in run.series(key)]
    return round(statistics.fmean(values) * run.metrics[-1]["step"]) if values else 0


def _last(run: RunFiles, key: str) -> int:
    return int(run.metrics[-1].get(key, 0)) if run.metrics else 0


def _median(run: RunFiles, key: str, form: str) -> str:
    values = [value for _, value in run.series(key)]
    return form.format(statistics.median(values)) if values else "–"


def _short(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:g}"
