"""`m4train evaluate benchmarks=[...] model=MODEL`: public benchmarks with their official metrics and prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from m4train.errors import ConfigError
from m4train.run_files import EVALUATION

KEYS = {
    "benchmarks": "names of conf/benchmark, or YAML files: [docvqa,mmstar]",
    "model": "a folder, hub id, run, checkpoint, or adapter",
    "data": "the folder that holds a folder or file for each benchmark",
    "out": "where results go; by default `benchmarks` in the model's folder",
    "max_samples": "samples of each, chosen by the hash of their keys",
    "batch_size": "questions answered together",
    "scoring": "generation or likelihood, instead of what the benchmark says",
    "shots": "answered samples before each question, in the prompt of Idefics: 0 (two without images), 4, 8, 16, 32",
    "support": "as data, where the shots are drawn from",
    "device": "auto, cpu, cuda",
    "dtype": "auto, fp32, bf16, fp16",
}


def benchmark(arguments: list[str]) -> int:
    """Prints a table; writes evaluation.json, a line a sample, and files for test servers. Returns 0."""
    given = _given(arguments)
    names = [name.strip() for name in given["benchmarks"].strip("[]").split(",") if name.strip()]
    from dataclasses import replace

    from m4train.evaluation.benchmarks.records import place_of
    from m4train.evaluation.benchmarks.run import run_benchmark, submission
    from m4train.evaluation.benchmarks.spec import load_benchmark

    chosen = [load_benchmark(name) for name in names]
    if scoring := given.get("scoring"):
        if scoring not in ("generation", "likelihood"):
            raise ConfigError(f"scoring is {scoring}, but must be generation or likelihood.")
        chosen = [replace(each, scoring=scoring) for each in chosen]
    places = [place_of(Path(given["data"]), each.name) for each in chosen]
    setting = _setting(given)
    out = Path(given.get("out") or Path(given["model"]) / "benchmarks")
    table: dict[str, Any] = _held(out / EVALUATION)
    for each, place in zip(chosen, places):
        result = run_benchmark(each, place, setting, out)
        table[each.name] = _stated(result, setting.name)
        (out / EVALUATION).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        if (file := submission(result)) is not None:
            (out / f"{each.name}-submission.json").write_text(json.dumps(file), encoding="utf-8")
        print(_row(each.name, table[each.name]), flush=True)
    return 0


def _given(arguments: list[str]) -> dict[str, str]:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    for name in given:
        if name not in KEYS:
            raise ConfigError(f"evaluate benchmarks=... takes {', '.join(KEYS)}, but not {name!r}.")
    for name in ("benchmarks", "model", "data"):
        if not given.get(name):
            raise ConfigError(f"evaluate benchmarks=... needs {name}=, {KEYS[name]}.")
    if "shots" in given and not (given["shots"].isdigit() and given.get("support")):
        raise ConfigError("shots is a whole number, and needs support=, the folder that shots are drawn from.")
    if "shots" in given and given.get("scoring") == "likelihood":
        raise ConfigError("shots go with scoring=generation: leave scoring=likelihood out.")
    for name in ("max_samples", "batch_size"):
        if name in given and not (given[name].isdigit() and int(given[name])):
            raise ConfigError(f"{name} is {given[name]}, but must be a whole number of at least 1.")
    return given


def _setting(given: dict[str, str]) -> Any:
    from m4train.commands.answerer import device_named, dtype_named, load
    from m4train.config import DecodingConfig
    from m4train.evaluation.benchmarks.run import Setting
    from m4train.evaluation.decoding import Decoding

    device = device_named(given.get("device", "auto"))
    model, processor = load(given["model"], dtype_named(given.get("dtype", "auto"), device))
    decoding = Decoding.of(model, processor, DecodingConfig(), 1)
    limit = int(given["max_samples"]) if "max_samples" in given else None
    size = int(given.get("batch_size", 16))
    name = str(Path(given["model"]).resolve()) if Path(given["model"]).exists() else given["model"]
    place = (model.to(device).eval(), processor, model.config.model_type, name, decoding, device, size, limit)
    shots = int(given["shots"]) if "shots" in given else None
    return Setting(*place, shots, Path(given["support"]) if "support" in given else None)


def _held(path: Path) -> dict[str, Any]:
    from m4train.json_files import read_mapping

    return dict(read_mapping(path)) if path.is_file() else {}


def _stated(result: Any, model: str) -> dict[str, Any]:
    """What evaluation.json says of one benchmark."""
    spec, scores = result.benchmark, result.scores
    stated: dict[str, Any] = {"metric": spec.metric, "split": spec.split, "model": model, "prompt": result.prompt}
    stated |= {"scoring": spec.scoring, "count": len(result.lines)}
    if scores is not None:
        times = scores.shown_times
        interval = [round(bound * times, 4) if math.isfinite(bound) else None for bound in scores.interval]
        stated |= {"score": round(scores.value * times, 4), "interval": interval, **scores.counts, **scores.others}
        stated["groups"] = {name: round(100 * value, 4) for name, value in result.groups.items()}
    return stated | ({"remarks": list(result.remarks)} if result.remarks else {})


def _row(name: str, stated: dict[str, Any]) -> str:
    if "score" not in stated:
        return f"{name:<16}{'no answers: see the file for the test server':<30}{stated['count']:>8} samples"
    low, high = stated["interval"]
    around = f"[{low:.2f}, {high:.2f}]" if low is not None else ""
    remarks = "; ".join(stated.get("remarks", ()))
    return (
        f"{name:<16}{stated['metric']:<20}{stated['score']:>9.2f} {around:<20}{stated['count']:>7} samples  {remarks}"
    )
