"""`m4train train -m`: one run for each point of a sweep, by Hydra's sweepers and launchers."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from m4train.commands.arguments import Composed
from m4train.config.compose import compose, explained, hydra_at
from m4train.config.loading import parse
from m4train.config.stages import read_outline
from m4train.config.texts import as_text
from m4train.errors import ConfigError, TrainingError
from m4train.exits import COMPLETE, STOPPED_EARLY
from m4train.json_lines import OF_A_STEP, read_lines
from m4train.run_files import METRICS

_LONGEST = 120  # characters of a folder's name
_QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.sweep.subdir=.")


def sweep(asked: Composed, overrides: list[str]) -> int:
    """Trains every point that the sweep of `overrides` gives, each in `run_dir/POINT`; points that are trained already are not
    trained again. Raises ConfigError for a sweep that cannot be composed, TrainingError if a run failed."""
    over_points(asked, overrides, run_point)
    print("the runs of the sweep are trained: m4train compare RUN RUN ... shows them next to each other", flush=True)
    return COMPLETE


def points_of(asked: Composed, overrides: list[str]) -> tuple[Path, list[list[str]]]:
    """The folder of a sweep, and the arguments of `m4train train` for each of its points, of which none is trained. Raises
    ConfigError for a sweeper that learns from one run what the next one is."""
    if any(override.startswith("hydra/sweeper=") and override != "hydra/sweeper=basic" for override in overrides):
        raise ConfigError(
            "an array has all its runs from the start: leave hydra/sweeper out, or sweep with `m4train train -m`."
        )
    found: list[list[str]] = []
    folders: list[Path] = []

    def note(options: list[str], fixed: list[str], composed: Any) -> float:
        folders.append(Path(str(composed.run_dir)))
        found.append([*options, *_point(fixed, composed)[1]])
        return 0.0

    over_points(asked, overrides, note)
    return folders[0], found


def over_points(asked: Composed, overrides: list[str], act: Callable[[list[str], list[str], Any], float]) -> None:
    """Calls `act` with Hydra's options, the overrides that are the same for all, and the composition, for every point."""
    where = asked.where()
    # A key that is given again means its last value, as without a sweep; Hydra would sweep over the earlier one as well.
    last = {override.partition("=")[0]: number for number, override in enumerate(overrides) if "=" in override}
    overrides = [o for number, o in enumerate(overrides) if last.get(o.partition("=")[0], number) == number]
    swept = [override for override in overrides if parse(as_text(override)).is_sweep_override()]
    fixed = [override for override in overrides if override not in swept and not override.startswith("hydra")]
    try:
        stages = read_outline(lambda found: compose(found, where), fixed).stages
    except ConfigError:  # without what is swept it may be incomplete
        stages = []
    _refuse_stages(stages)
    given = [*_QUIET, "hydra.sweep.dir=${run_dir}", *(_kept_as_text(override) for override in overrides)]
    with explained(where):
        hydra_at(where).multirun(where.name, partial(act, asked.again(), fixed), given, with_log_configuration=False)


def _refuse_stages(stages: Any) -> None:
    if stages:
        raise ConfigError("a sweep trains one run at each point, not stages: choose the experiment of one stage.")


def run_point(options: list[str], fixed: list[str], composed: Any) -> float:
    """Trains one point in a process of its own; returns what a sweeper may make smaller: the last value of trainer.best.metric, or
    of eval/loss, or of loss."""
    _refuse_stages(composed.stages)
    run_dir, words = _point(fixed, composed)
    print(f"sweep: {' '.join(words[len(fixed) : -1]) or 'one point'} in {run_dir}", flush=True)
    command = [sys.executable, "-m", "m4train", "train", *options, *words]
    code = subprocess.run(command, env={**os.environ}).returncode
    if code == STOPPED_EARLY:
        raise TrainingError(f"{run_dir} was stopped early: the same sweep goes on from its checkpoint.")
    if code != COMPLETE:
        raise TrainingError(f"{run_dir} ended with exit code {code}; the same sweep trains what is missing.")
    return _objective(run_dir, str(composed.trainer.best.metric or "eval/loss"))


def _point(fixed: list[str], composed: Any) -> tuple[Path, list[str]]:
    """The run directory of the point that is composed, and its overrides."""
    from hydra.core.hydra_config import HydraConfig

    task = [str(override) for override in HydraConfig.get().overrides.task]
    kept = {override.partition("=")[0] for override in fixed}  # sweepers write values in their own way
    point = [override for override in task if override.partition("=")[0] not in kept]
    run_dir = Path(str(composed.run_dir)) / point_name(point)
    return run_dir, [*fixed, *point, f'run_dir="{run_dir}"']


def point_name(point: list[str]) -> str:
    """The folder of a point: its overrides, without what no name of a folder may hold."""
    text = re.sub(r"[^\w.=,+~-]+", "_", ",".join(sorted(point))) or "point"
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _kept_as_text(override: str) -> str:
    """An override whose text stays what was written when a sweeper writes it again: 2025_01,2025_02 as '2025_01','2025_02'."""
    key, equals, value = override.partition("=")
    if not equals or any(mark in value for mark in "'\"([{$") or "," not in value:
        return as_text(override)
    values = [as_text(f"{key}={one.strip()}").partition("=")[2] for one in value.split(",")]
    return f"{key}={','.join(values)}"


def _objective(run_dir: Path, metric: str) -> float:
    rows = read_lines(run_dir / METRICS, OF_A_STEP)
    for name in (metric, "loss"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            return float(values[-1])
    raise ConfigError(f"{run_dir} has logged neither {metric} nor loss: set trainer.log_every within the run.")
