"""`m4train sync`: the W&B files of runs that were offline, sent in the order of their starts."""

from __future__ import annotations

import glob
import subprocess
import sys
from pathlib import Path

from m4train.config.packages import has_wandb_key, need
from m4train.errors import ConfigError, TrainingError
from m4train.exits import COMPLETE
from m4train.run_files import stage_folders
from m4train.training.wandb_runs import remembered


def sync(arguments: list[str]) -> int:
    """Sends what each run directory holds and W&B does not have yet: its starts as one run, its evaluations and exports next to
    it. Raises ConfigError if there is nothing to send, or no key; TrainingError if W&B did not take it."""
    if not arguments or any(argument.startswith("-") for argument in arguments):
        raise ConfigError("sync needs the directories of runs: m4train sync RUN [RUN ...].")
    need("wandb", "sync")
    runs = [run for argument in arguments for run in stage_folders(Path(argument))]
    found = [folder for run in runs for folder in offline_folders(run)]
    unsent = [folder for folder in found if not list(folder.glob("*.wandb.synced"))]
    if not unsent:
        print(f"nothing to send: all {len(found)} offline parts are at W&B already.")
        return COMPLETE
    if not has_wandb_key():
        raise ConfigError("There is no W&B key: run `wandb login`, or set WANDB_API_KEY.")
    command = [sys.executable, "-m", "wandb", "sync", *map(str, unsent)]
    if subprocess.run(command).returncode or not all(list(folder.glob("*.wandb.synced")) for folder in unsent):
        raise TrainingError("W&B did not take all of it: what it says is above, and the same command goes on.")
    return COMPLETE


def offline_folders(run_dir: Path) -> list[Path]:
    """The folders that W&B wrote offline for a run directory, oldest first. Raises ConfigError if there are none."""
    held, found = remembered(run_dir), list(run_dir.glob("wandb/offline-run-*"))
    if held.get("dir"):
        found += Path(held["dir"]).glob(f"wandb/offline-run-*-{glob.escape(held['id'])}*")
    folders = {folder.resolve() for folder in found if list(folder.glob("*.wandb"))}
    if not folders:
        raise ConfigError(
            f"{run_dir} holds no offline files of W&B: name the directory of a run that had logging=offline."
        )
    return sorted(folders, key=lambda folder: folder.name)
