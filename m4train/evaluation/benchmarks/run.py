"""A benchmark from its records to its score: what is stored a sample, and the files of test servers."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m4train.evaluation.benchmarks.asking import Line, Setting, answered, chosen_numbers, prompt_name, share, to_ask
from m4train.evaluation.benchmarks.spec import Benchmark
from m4train.evaluation.metrics.registry import OF_WHOLE_SETS, load_metric
from m4train.evaluation.metrics.said import Said, Scores
from m4train.json_lines import keep_lines


@dataclass(frozen=True)
class Result:
    """The scores of one benchmark, with those of its groups: column/value -> mean."""

    benchmark: Benchmark
    lines: list[Line]
    scores: Scores | None  # None: no sample has an answer, as in the splits of test servers
    prompt: str  # its hash
    groups: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def run_benchmark(benchmark: Benchmark, place: Path, setting: Setting, out: Path) -> Result | None:
    """Asks what `out`/NAME.jsonl does not hold yet of this model and prompt, and scores all of it; the result is rank 0's.

    All ranks call it. Each appends its lines as answers are made: a run that is killed goes on, on any number of ranks.
    """
    engine, prompt = setting.engine, prompt_name(benchmark, setting)
    path, of_this = out / f"{benchmark.name}.jsonl", {"model": setting.name, "prompt": prompt}
    held = _collected(path, of_this) if engine.rank == 0 else []
    done = engine.broadcast({line["number"] for line in held})
    chosen = chosen_numbers(benchmark, place, setting)
    asked = to_ask(benchmark, place, setting, share(chosen - done, engine.rank, engine.world_size))
    with (path if engine.rank == 0 else _part(path, engine.rank)).open("a", encoding="utf-8") as file:
        for answer in answered(benchmark, setting, asked):
            file.write(json.dumps(of_this | answer) + "\n")
            file.flush()
    engine.barrier()
    if engine.rank != 0:
        return None
    lines = sorted(_collected(path, of_this), key=lambda line: line["number"])
    result = scored(benchmark, [line for line in lines if line["number"] in chosen], prompt)
    _replace(path, result.lines)
    return result


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.rank-{rank}")


def _collected(path: Path, of_this: Line) -> list[Line]:
    """What all ranks have answered so far, each sample once, put together into one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [path, *sorted(path.parent.glob(f"{path.name}.rank-*"))]
    found = [line for part in parts for line in keep_lines(part, needs=("number",)) if line.items() >= of_this.items()]
    lines = list({line["number"]: line for line in found}.values())
    _replace(path, lines)
    for part in parts[1:]:
        part.unlink()
    return lines


def scored(benchmark: Benchmark, lines: Sequence[Line], prompt: str) -> Result:
    """The lines with their scores, and what is reported of them."""
    known = [line for line in lines if line["references"] != [""]]
    if not known:
        return Result(benchmark, list(lines), None, prompt, remarks=("no sample has an answer",))
    scores = load_metric(benchmark.metric)([_said(line) for line in known])
    lines = [line | {"score": score} for line, score in zip(known, scores.samples, strict=True)]
    groups: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for column in benchmark.groups:
            groups[f"{column}/{line['about'].get(column)}"].append(line["score"])
    means = {name: sum(values) / len(values) for name, values in sorted(groups.items())}
    remarks = []
    if len(lines) != benchmark.expected:
        remarks.append(f"{len(lines)} of {benchmark.expected} samples")
        if benchmark.metric in OF_WHOLE_SETS:
            remarks.append("its score depends on the whole set: not comparable with published ones")
    return Result(benchmark, lines, scores, prompt, means, tuple(remarks))


def submission(result: Result) -> list[dict[str, Any]] | None:
    """What the server of the test split takes: [{id, answer}]; None for a benchmark without one."""
    name = result.benchmark.submission
    if name is None:
        return None
    keys = ((int(line["key"]) if line["key"].isdigit() else line["key"], line["answer"]) for line in result.lines)
    return [{name: key, "answer": answer} for key, answer in keys]


def _said(line: Line) -> Said:
    place = (tuple(line["references"]), line["question"], line["key"], tuple(line["options"]), line["about"])
    return Said(line["answer"], *place)


def _replace(path: Path, lines: Sequence[Line]) -> None:
    aside = path.with_name(f"{path.name}.writing")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)
