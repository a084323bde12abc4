"""The files of a run directory: each name once, and reading them: configuration, metrics, answers, and earlier runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from m4train.errors import DataError
from m4train.json_lines import OF_A_STEP, read_lines

CONFIG = "config.yaml"  # what the run is trained with
METRICS = "metrics.jsonl"  # one line a logged step
CURSORS = "cursors.jsonl"  # where the plan is, for replay
STARTS = "starts.jsonl"  # the configuration from a step on, one line a start that changed it
ESTIMATE = "estimate.json"  # memory and time that were expected, and measured, for `m4train estimate --calibration`
SAMPLES = "samples.jsonl"  # answers given while the model trains
PARAMETERS = "parameters.json"  # the table of parts
QUARANTINE = "quarantine.jsonl"  # samples that were dropped, and why
BEST = "checkpoints/best.json"  # which checkpoint has the best value of trainer.best.metric
CHECKPOINTS = "checkpoints"  # the folder of step-NNNNNN folders
STATE = "state.json"  # in a checkpoint: step, plan, configuration
EVALUATION = "evaluation.json"  # loss and score of each held-out source
ANSWERS = "answers.jsonl"  # every scored answer
EVALUATIONS = "evaluation.jsonl"  # scores of benchmarks, a line a checkpoint and benchmark
EXPORT = "export"  # the Hugging Face folder, unless export.folder names another
REPORT = "report.html"
PREVIEW = "preview.html"
DEEPSPEED = "deepspeed.json"  # what DeepSpeed was given
DEATHS = "deaths.jsonl"  # which samples a rank died with, one line a death
STALLED = "stalled"  # a folder: what each rank was doing when a run hung
WANDB = "wandb.json"  # id and group of the W&B run, and the last step it has, so that a continued run is the same one
TENSORBOARD = "tensorboard"  # the folder of its files
CLAIM = "claim"  # which process trains the run; locked while it does
STAGES = "stages.json"  # of a run of several stages: their names in order, and which are trained
STOP = "stop"  # a file of this name ends the run with a checkpoint
LINEAGE_FILE = "m4train.json"  # in an exported folder: which run and step it came from


def shown_score(result: dict[str, Any]) -> str:
    """The score of a source in evaluation.json as people read it: a percentage, unless it is not a share."""
    value = result[result["metric"]]
    return f"{value * result['shown_times']:.2f}" if "shown_times" in result else f"{value:.1%}"


def replay_page(step: int) -> str:
    return f"replay-step-{step}.html"


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
    followed: list[dict[str, Any]] = field(default_factory=list)  # scores of benchmarks by a job that followed it

    @property
    def name(self) -> str:
        return self.config.name

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every logged step that has `key`."""
        return [(row["step"], row[key]) for row in self.metrics if isinstance(row.get(key), (int, float))]


def read_run(folder: Path) -> RunFiles:
    """Reads a run directory; raises DataError if it holds no config.yaml."""
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder} holds no config.yaml: train first, or set run_dir to the directory of a run.")
    return RunFiles(
        folder=folder,
        config=OmegaConf.create(inert(load_yaml(folder / CONFIG))),
        metrics=read_lines(folder / METRICS, OF_A_STEP),
        parameters=_json(folder / PARAMETERS, []),
        evaluation=_json(folder / EVALUATION, {}),
        answers=read_lines(folder / ANSWERS),
        samples=read_lines(folder / SAMPLES, OF_A_STEP),
        quarantine=read_lines(folder / QUARANTINE),
        followed=read_lines(folder / EVALUATIONS, OF_A_STEP),
    )


def stage_names(folder: Path) -> list[str]:
    """The stages of the run in `folder`, in their order; none of a run that has none."""
    return list(noted_stages(folder))


def noted_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What is noted of each stage of the run in `folder`, by its name: the content of the checkpoint that it began from
    (`began_from`) and, once it is trained, of the one that it ended with (`checkpoint`)."""
    entries = [entry for entry in _json(folder / STAGES, []) if isinstance(entry, dict)]
    return {entry["name"]: entry for entry in entries if isinstance(entry.get("name"), str)}


def whole_of(run_dir: Path) -> Path:
    """The folder of the run that the run in `run_dir` is a stage of; `run_dir` itself if it is none."""
    return run_dir.parent if run_dir.name in stage_names(run_dir.parent) else run_dir


def stage_folders(folder: Path) -> list[Path]:
    """The folders of the stages of the run in `folder` that have begun; of a run that has none, or of a path that is none, itself."""
    return [folder / name for name in stage_names(folder) if (folder / name / CONFIG).is_file()] or [folder]


def newest_stage(folder: Path) -> Path:
    """Of a run of several stages the folder of the last one that has begun; of another run, or of a path that is none, itself."""
    return stage_folders(folder)[-1]


def lineage(folder: Path) -> list[RunFiles]:
    """This run and the runs its starting weights came from, oldest first. The stages before it are found by their names, wherever
    the whole was moved to and the command is given."""
    whole, runs = whole_of(folder), [read_run(folder)]
    if whole != folder:
        begun = stage_folders(whole)
        runs = [read_run(each) for each in begun[: begun.index(folder)]] + runs
    while (start := runs[0].config.model.pretrained) is not None:
        origin = origin_of(Path(start))
        if origin is None or not (Path(origin) / CONFIG).is_file():
            break
        earlier = read_run(Path(origin))
        if any(earlier.folder.resolve() == run.folder.resolve() for run in runs):
            break
        runs.insert(0, earlier)
    return runs


def origin_of(start: Path) -> str | None:
    """The run directory that an exported folder, a checkpoint or a run directory comes from."""
    start = newest_stage(start)
    if (start / CONFIG).is_file():
        return str(start)
    if (start / STATE).is_file():
        return str(start.parent.parent)
    return _json(start / LINEAGE_FILE, {}).get("run_dir")


def _json(path: Path, default: Any) -> Any:
    """What a file holds, or the default if it is not there, or damaged, which is said."""
    if not path.is_file():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, type(default)):
        return found
    print(f"{path} is damaged and passed over.")
    return default


def load_yaml(path: Path) -> dict[str, Any]:
    """The keys of a config.yaml, as plain values. Raises DataError if it is damaged, or holds what no run writes: tags of
    Python, and aliases, of which a few lines can stand for more than memory holds."""
    try:
        text = path.read_text(encoding="utf-8")
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        found = yaml.load(text, Loader=get_yaml_loader())  # a safe loader, and that of who wrote it
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(_DAMAGED.format(path=path, why=str(error).splitlines()[0])) from error
    if not isinstance(found, dict) or not found:
        raise DataError(_DAMAGED.format(path=path, why="it holds no keys"))
    return found


def _check_events(events: Iterable[yaml.Event]) -> None:
    """Raises ValueError for an alias, and for lists in lists that would take a parser minutes."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it holds an alias")
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")


_DEEPEST = 100
_DAMAGED = "{path} is damaged ({why}): starting the run again with its overrides writes it again."


def inert(stored: Any) -> Any:
    """Stored values as OmegaConf takes them for themselves. `${` in a text stands for these two letters: interpolations were
    resolved when the run was composed, and resolving those of a file would show what the environment of its reader holds."""
    if isinstance(stored, str):
        return _INTERPOLATION.sub(r"\1\1\\${", stored)
    if isinstance(stored, Mapping):
        return {key: inert(value) for key, value in stored.items()}
    return [inert(value) for value in stored] if isinstance(stored, (list, tuple)) else stored


_INTERPOLATION = re.compile(r"(\\*)\$\{")
