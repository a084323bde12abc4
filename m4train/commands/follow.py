"""`m4train evaluate run_dir=RUN follow=true`: benchmarks of each checkpoint of a run as it appears, into the run's own curves."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m4train import exits
from m4train.commands.arguments import handed_over
from m4train.commands.benchmark import (
    _HOW,
    engine_config,
    load_chosen,
    made_engine,
    places_of,
    read,
    scored_by,
    setting_of,
)
from m4train.config import Config
from m4train.errors import ConfigError, M4Error
from m4train.run_files import CHECKPOINTS, EVALUATIONS

KEYS = {
    "run_dir": "the run",
    "follow": "true: go on until its last checkpoint; false: those that are there",
    "benchmarks": "names, or {NAME: samples}; by default the run's trainer.benchmarks",
    "data": "the folder of their data; by default the run's trainer.benchmark_data",
    "max_samples": "samples of each, chosen by the hash of their keys",
    "scoring": "likelihood, which is the default, or generation",
    "idle": "end after so many seconds without a new checkpoint (21600)",
    "poll": "seconds between two looks (30)",
    **_HOW,
}


_WIND_UP = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM sends ahead of the end of a job


def follow(arguments: Sequence[str]) -> int:
    """Appends a line a checkpoint and benchmark to RUN/evaluation.jsonl, skipping what it holds, and posts it to the run's own W&B
    run. Returns 0, or 3 if a signal ended it, after what was being answered."""
    given = given_of(arguments)
    watch = Watch(given)
    config = engine_config(given, watch.run_dir)
    if (code := handed_over([config], ["evaluate", *arguments])) is not None:
        return code
    engine, told = made_engine(config, given), []
    before = {number: signal.signal(number, lambda given, frame: told.append(given)) for number in _WIND_UP}
    try:
        with engine.autocast():
            while (task := engine.broadcast(watch.next(bool(told)) if engine.rank == 0 else None)) is not None:
                watch.score(task, engine)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    engine.shutdown()
    return exits.stopped_early() if told else exits.COMPLETE


def given_of(arguments: Sequence[str]) -> dict[str, str]:
    """The arguments by name. Raises ConfigError for one that is wrong or missing."""
    given = read(arguments, KEYS, "evaluate follow=...", ("run_dir", "follow"))
    if given["follow"] not in ("true", "false"):
        raise ConfigError(f"follow is {given['follow']}, but must be true or false.")
    for name in ("idle", "poll"):
        if name in given and not given[name].replace(".", "", 1).isdigit():
            raise ConfigError(f"{name} is {given[name]}, but must be a number of seconds.")
    return given


class Watch:
    """What is to do for a run, and what was done."""

    def __init__(self, given: dict[str, str]) -> None:
        from m4train.config.compose import load_run_config

        self.given, self.run_dir = given, Path(given["run_dir"])
        self.config: Config = load_run_config([f"run_dir={self.run_dir}"])
        limits = _limits(given["benchmarks"]) if "benchmarks" in given else dict(self.config.trainer.benchmarks)
        data = given.get("data") or self.config.trainer.benchmark_data
        if not limits or not data:
            raise ConfigError(
                f"{self.run_dir} was trained without trainer.benchmarks: name benchmarks=[mmstar,docvqa] and data=FOLDER."
            )
        chosen = load_chosen(list(limits), given.get("scoring", "likelihood"))
        self.benchmarks = list(zip(chosen, places_of(chosen, data), limits.values()))
        self.idle, self.poll = float(given.get("idle", 21600)), float(given.get("poll", 30))
        self._last = time.monotonic()
        self._given_up: set[str] = set()

    def next(self, told: bool) -> tuple[int, str, str] | str | None:
        """(step, name, hash) of a finished checkpoint to score; "wait" after waiting for one; None at the end."""
        for step, folder, weights in self._finished() if not told else ():
            if folder.name not in self._given_up and self._open(folder.name, weights):
                self._last = time.monotonic()
                return step, folder.name, weights
        if told or self.given["follow"] == "false" or self._over() or time.monotonic() - self._last > self.idle:
            return None
        time.sleep(self.poll)
        return "wait"

    def score(self, task: Any, engine: Any) -> None:
        """Scores one checkpoint on the benchmarks it lacks; all ranks call it. One that the run has removed is left out."""
        if task == "wait":
            return
        step, name, weights = task
        folder, out = self.run_dir / CHECKPOINTS / name, self.run_dir / "benchmarks" / name
        try:
            setting = setting_of(self.given, str(folder), f"{name}@{weights}", engine, out)
        except (M4Error, OSError):
            if folder.is_dir():
                raise
            print(f"{name} is gone: the run keeps only its last checkpoints.", flush=True)
            self._given_up.add(name)
            return
        from dataclasses import replace

        rows = []
        for benchmark, place, limit in engine.broadcast(self._open(name, weights) if engine.rank == 0 else None):
            limited = replace(setting, limit=setting.limit if "max_samples" in self.given else limit)
            stated = scored_by(benchmark, place, limited, out)
            if stated is not None:
                rows.append(self._line(step, name, weights, benchmark, limited.limit, stated))
                with (self.run_dir / EVALUATIONS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(f"{name}: {benchmark.name} {stated.get('score')}", flush=True)
        if rows:
            self._post(step, rows)

    def _finished(self) -> Iterator[tuple[int, Path, str]]:
        from m4train.training.checkpoints.files import MANIFEST, checkpoints_in, sha256

        for step, folder in checkpoints_in(self.run_dir / CHECKPOINTS):
            if (folder / MANIFEST).is_file():  # its last file
                yield step, folder, sha256(folder / MANIFEST)[:12]

    def _open(self, name: str, weights: str) -> list[Any]:
        """The benchmarks that a checkpoint has no line of."""
        from m4train.json_lines import read_lines

        keys = ("checkpoint", "weights", "benchmark", "prompt", "max_samples")
        done = {
            tuple(line.get(key) for key in keys) for line in read_lines(self.run_dir / EVALUATIONS, ("checkpoint",))
        }
        found = []
        for benchmark, place, limit in self.benchmarks:
            limit = int(self.given["max_samples"]) if "max_samples" in self.given else limit
            if (name, weights, benchmark.name, benchmark.prompt_hash(self.config.model.family), limit) not in done:
                found.append((benchmark, place, limit))
        return found

    def _over(self) -> bool:
        """Whether the last checkpoint of the run was seen."""
        steps, last = [step for step, _, _ in self._finished()], self.config.trainer.max_steps
        return isinstance(last, int) and bool(steps) and steps[-1] >= last

    def _line(
        self, step: int, name: str, weights: str, benchmark: Any, limit: int | None, stated: dict[str, Any]
    ) -> dict[str, Any]:
        key = {"checkpoint": name, "step": step, "weights": weights, "benchmark": benchmark.name, "max_samples": limit}
        return {**stated, **key}

    def _post(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Into the W&B run of the run, at the step of the checkpoint, as the curves of trainer.benchmarks."""
        scores = {row["benchmark"]: row["value"] for row in rows if "value" in row}
        if not scores:
            return
        weights = {name: self.config.trainer.benchmark_weights.get(name, 1.0) for name in scores}
        mean = sum(weights[name] * value for name, value in scores.items()) / sum(weights.values())
        curves = {f"eval/benchmark/{name}": value for name, value in scores.items()} | {"eval/benchmarks": mean}
        _posted(self.config, self.run_dir, {**curves, "step": step})


def _posted(config: Config, run_dir: Path, metrics: dict[str, Any]) -> None:
    from m4train.config.packages import uses_wandb
    from m4train.training.callbacks.wandb import post

    if uses_wandb(config.logging):
        post(config, run_dir, metrics)


def _limits(text: str) -> dict[str, int | None]:
    """Names of benchmarks, with how many samples of each: {mmstar: 500}, [mmstar,docvqa] or mmstar. Raises ConfigError."""
    inner = text.strip().strip("{}[]")
    found: dict[str, int | None] = {}
    for each in filter(None, (part.strip() for part in inner.split(","))):
        name, colon, count = (word.strip() for word in each.partition(":"))
        if colon and not (count.isdigit() and int(count)):
            raise ConfigError(
                f"benchmarks gives {name} {count!r} samples, but that must be a whole number of at least 1."
            )
        found[name] = int(count) if colon else None
    return found
