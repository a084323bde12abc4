"""Going back inside a run directory: what comes after the chosen step is set aside, under a name that says so."""

from __future__ import annotations

import os
from pathlib import Path

from m4train.json_lines import keep_lines, lines_past
from m4train.run_files import CHECKPOINTS, CURSORS, METRICS, SAMPLES, STARTS, WANDB
from m4train.training.checkpoints.files import checkpoints_in

SET_ASIDE = "set-aside"
_LINES = (METRICS, CURSORS, SAMPLES, STARTS)


def set_aside(run_dir: Path, step: int, departs: bool) -> str | None:
    """Moves what a run directory holds past `step` to `set-aside/after-step-NNNNNN`, so that it never counts again; returns a
    sentence that says so, or None if nothing was moved.

    Checkpoints past `step` are those the run was told to go back from (`departs`), or damaged ones that were passed over.
    Without any of them the lines of a run that goes on are only made again, and stay for their callbacks to cut. The newest
    checkpoint goes first: a kill in between leaves a shorter run that is whole.
    """
    later = [path for number, path in checkpoints_in(run_dir / CHECKPOINTS) if number > step]
    lines = {name: past for name in _LINES if (past := lines_past(run_dir / name, step))}
    if not later and not (departs and lines):
        return None
    aside = _fresh(run_dir / SET_ASIDE, f"after-step-{step:06d}")
    (aside / CHECKPOINTS).mkdir(parents=True)
    for path in reversed(later):
        os.rename(path, aside / CHECKPOINTS / path.name)
    for name, past in lines.items():
        (aside / name).write_bytes(past)
        keep_lines(run_dir / name, step)
    if departs and (run_dir / WANDB).exists():
        os.rename(run_dir / WANDB, aside / WANDB)
    held = [path.name for path in later] + list(lines)
    return f"{', '.join(held)} past step {step} set aside in {aside}; delete it when nobody needs it."


def _fresh(folder: Path, name: str) -> Path:
    """A folder of this name, or of this name and a number, that is not there yet."""
    number = 1
    while (path := folder / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path
