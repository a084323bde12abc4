"""Reading a run directory: its configuration, metrics, answers, and the run its model came from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from m4train.errors import DataError
from m4train.json_lines import read_lines

LINEAGE_FILE = "m4train.json"  # in an exported folder: which run and step it came from


@dataclass(frozen=True)
class RunFiles:
    """What a run left behind; files it has not written yet are empty."""

    folder: Path
    config: Any
    metrics: list[dict[str, Any]]
    parameters: list[dict[str, Any]]
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)  # answers given while it trained
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.config.name

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every logged step that has `key`."""
        return [(row["step"], row[key]) for row in self.metrics if isinstance(row.get(key), (int, float))]


def read_run(folder: Path) -> RunFiles:
    """Reads a run directory; raises DataError where it holds no config.yaml."""
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} holds no config.yaml: train first, or set run_dir to the directory of a run.")
    return RunFiles(
        folder=folder,
        config=OmegaConf.load(folder / "config.yaml"),
        metrics=read_lines(folder / "metrics.jsonl"),
        parameters=_json(folder / "parameters.json", []),
        evaluation=_json(folder / "evaluation.json", {}),
        answers=read_lines(folder / "answers.jsonl"),
        samples=read_lines(folder / "samples.jsonl"),
        quarantine=read_lines(folder / "quarantine.jsonl"),
    )


def lineage(folder: Path) -> list[RunFiles]:
    """This run and the runs its starting weights came from, oldest first."""
    runs = [read_run(folder)]
    while (start := runs[0].config.model.pretrained) is not None:
        origin = _origin(Path(start))
        if origin is None or not (Path(origin) / "config.yaml").is_file():
            break
        earlier = read_run(Path(origin))
        if any(earlier.folder.resolve() == run.folder.resolve() for run in runs):
            break
        runs.insert(0, earlier)
    return runs


def _origin(start: Path) -> str | None:
    """The run directory that an exported folder, a checkpoint or a run directory comes from."""
    if (start / "config.yaml").is_file():
        return str(start)
    if (start / "state.json").is_file():
        return str(start.parent.parent)
    return _json(start / LINEAGE_FILE, {}).get("run_dir")


def _json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else default
