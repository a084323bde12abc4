"""`m4train evaluate benchmarks=[...] model=MODEL`: public benchmarks with their official metrics and prompts, under any engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4train.commands.arguments import handed_over
from m4train.config import ENGINES, Config
from m4train.errors import ConfigError
from m4train.run_files import EVALUATION
from m4train.terminal import narrated, stage

_HOW = {
    "batch_size": "questions answered together",
    "device": "auto, cpu, cuda; of engine=single",
    "dtype": "auto, fp32, bf16, fp16",
    "engine": "single, ddp, fsdp2, zero1 to zero3: processes share the questions, the last ones of each kind the weights too",
    "launch.processes": "processes to start here, if torchrun or SLURM starts none",
}
KEYS = {
    "benchmarks": "names of conf/benchmark, or YAML files: [docvqa,mmstar]",
    "model": "a folder, hub id, run, checkpoint, or adapter",
    "data": "the folder that holds a folder or file for each benchmark; hub: downloaded as the benchmark names it",
    "out": "where results go; by default `benchmarks` in the model's folder",
    "max_samples": "samples of each, chosen by the hash of their keys",
    "scoring": "generation or likelihood, instead of what the benchmark says",
    "shots": "answered samples before each question, in the prompt of Idefics: 0 (two without images), 4, 8, 16, 32",
    "support": "as data, where the shots are drawn from",
    "shots_by": "random, or rices: those whose images are most similar",
    "embeddings": "folder of NAME.npz by which rices chooses; by default those of the model's own vision tower, kept in out",
    **_HOW,
}


def benchmark(arguments: Sequence[str]) -> int:
    """Prints a table; writes evaluation.json, a line a sample, and files for test servers. Returns 0."""
    given = read(arguments, KEYS, "evaluate benchmarks=...", ("benchmarks", "model", "data"))
    _check(given)
    out = Path(given.get("out") or Path(given["model"]) / "benchmarks")
    config = engine_config(given, out)
    names = [name.strip() for name in given["benchmarks"].strip("[]").split(",") if name.strip()]
    chosen = load_chosen(names, given.get("scoring"))
    places = places_of(chosen, given["data"])
    if (code := handed_over([config], ["evaluate", *arguments])) is not None:
        return code
    with narrated():
        stage(f"reading the model {given['model']}")
        engine = made_engine(config, given)
        setting = setting_of(given, given["model"], _name(given["model"]), engine, out)
    table = _held(out / EVALUATION)
    with engine.autocast(), narrated():
        for each, place in zip(chosen, places):
            stage(f"answering the questions of {each.name}")
            stated = scored_by(each, place, setting, out)
            stage(None)
            if stated is not None:
                table[each.name] = stated
                (out / EVALUATION).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
                print(_row(each.name, stated), flush=True)
    engine.shutdown()
    return 0


def read(arguments: Sequence[str], known: dict[str, str], command: str, needed: Sequence[str]) -> dict[str, str]:
    """The values of `key=value` arguments. Raises ConfigError for one that is not known, missing or wrong."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    for name in given:
        if name not in known:
            raise ConfigError(f"{command} takes {', '.join(known)}, but not {name!r}.")
    for name in needed:
        if not given.get(name):
            raise ConfigError(f"{command} needs {name}=, {known[name]}.")
    for name in ("max_samples", "batch_size", "launch.processes"):
        if name in given and not (given[name].isdigit() and int(given[name])):
            raise ConfigError(f"{name} is {given[name]}, but must be a whole number of at least 1.")
    if given.get("scoring", "generation") not in ("generation", "likelihood"):
        raise ConfigError(f"scoring is {given['scoring']}, but must be generation or likelihood.")
    return given


def _check(given: dict[str, str]) -> None:
    if "shots" in given and not (given["shots"].isdigit() and given.get("support")):
        raise ConfigError("shots is a whole number, and needs support=, the folder that shots are drawn from.")
    if "shots" in given and given.get("scoring") == "likelihood":
        raise ConfigError("shots go with scoring=generation: leave scoring=likelihood out.")
    if given.get("shots_by", "random") not in ("random", "rices"):
        raise ConfigError(f"shots_by is {given['shots_by']}, but must be random or rices.")
    if "embeddings" in given and given.get("shots_by") != "rices":
        raise ConfigError("embeddings are what shots_by=rices chooses by: set it too, or leave them out.")
    if given.get("shots_by") == "rices" and given.get("shots", "0") == "0":
        raise ConfigError("shots_by=rices chooses shots with images: set shots to 4, 8, 16 or 32.")


def engine_config(given: dict[str, str], out: Path) -> Config:
    """The configuration of an engine that evaluates. Raises ConfigError for what does not go together."""
    name, config = given.get("engine", "single"), Config(run_dir=str(out))
    if name not in ENGINES:
        raise ConfigError(f"engine is {name}, but must be one of {', '.join(ENGINES)}.")
    processes = int(given.get("launch.processes", 1))
    if name == "single" and processes > 1:
        raise ConfigError(
            f"launch.processes is {processes}, but engine is single: choose engine=ddp, fsdp2 or zero1 to zero3."
        )
    if name != "single" and given.get("device", "auto") != "auto":
        raise ConfigError(
            f"device={given['device']} goes with engine=single: set CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    config.engine.name, config.launch.processes = name, processes if "launch.processes" in given else None
    config.trainer.precision, config.trainer.hang_timeout = "fp32", 0
    return config


def made_engine(config: Config, given: dict[str, str]) -> Any:
    from m4train.commands.answerer import device_named
    from m4train.training.engines import make_engine
    from m4train.training.engines.single import SingleEngine
    from m4train.training.precision import machine_precision

    if config.engine.name == "single":
        return SingleEngine(config, device_named(given.get("device", "auto")))
    if config.engine.name.startswith("zero"):  # it stores parameters in fp32, and computes in what is asked for
        import torch

        asked = given.get("dtype", "auto")
        auto = machine_precision() if torch.cuda.is_available() else "fp32"
        config.trainer.precision = auto if asked == "auto" else asked
    return make_engine(config)


def load_chosen(names: Sequence[str], scoring: str | None) -> list[Any]:
    from dataclasses import replace

    from m4train.evaluation.benchmarks.spec import load_benchmark

    chosen = [load_benchmark(name) for name in names]
    return [replace(each, scoring=scoring) for each in chosen] if scoring else chosen


def places_of(chosen: Sequence[Any], data: str) -> list[Path]:
    from m4train.evaluation.benchmarks.records import place_of
    from m4train.hub import dataset_files

    if data == "hub":
        return [dataset_files(each.data.split()[0], each.files or f"*{each.split}-*.parquet") for each in chosen]
    return [place_of(Path(data), each.name) for each in chosen]


def setting_of(given: dict[str, str], model: str, name: str, engine: Any, out: Path, limit: int | None = None) -> Any:
    """How the model of a folder or hub id is asked, placed by the engine; results call it `name`."""
    from m4train.commands.answerer import dtype_named, load
    from m4train.config import DecodingConfig
    from m4train.evaluation.benchmarks.asking import Setting
    from m4train.evaluation.decoding import Decoding

    stored = "fp32" if engine.config.engine.name.startswith("zero") else given.get("dtype", "auto")
    loaded, processor = load(model, dtype_named(stored, engine.device))
    decoding = Decoding.of(loaded, processor, DecodingConfig(), 1)
    engine.place(loaded.eval())
    limit = int(given["max_samples"]) if "max_samples" in given else limit
    shots = int(given["shots"]) if "shots" in given else None
    support = Path(given["support"]) if "support" in given else None
    rices = Path(given.get("embeddings") or out / "embeddings") if given.get("shots_by") == "rices" else None
    place = (loaded, processor, name, decoding, engine, int(given.get("batch_size", 16)), limit)
    return Setting(*place, shots, support, rices)


def scored_by(each: Any, place: Path, setting: Any, out: Path) -> dict[str, Any] | None:
    """Runs one benchmark; on rank 0, what evaluation.json says of it. All ranks call it."""
    from m4train.evaluation.benchmarks.run import run_benchmark, submission

    result = run_benchmark(each, place, setting, out)
    if result is None:
        return None
    if (file := submission(result)) is not None:
        (out / f"{each.name}-submission.json").write_text(json.dumps(file), encoding="utf-8")
    return _stated(result, setting.name)


def _name(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).exists() else model


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
        stated |= {
            "value": scores.value,
            "score": round(scores.value * times, 4),
            "interval": interval,
            **scores.counts,
            **scores.others,
        }
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
