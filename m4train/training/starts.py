"""starts.jsonl: which configuration a run had from which step on, so that a step is looked at with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m4train.json_lines import keep_lines, read_lines
from m4train.run_files import STARTS

_NEEDS = ("step", "config")


def note_start(run_dir: Path, step: int, config: dict[str, Any]) -> None:
    """Adds a line if the run goes on after `step` with another configuration than the last line has."""
    path = run_dir / STARTS
    run_dir.mkdir(parents=True, exist_ok=True)
    earlier = keep_lines(path, step, _NEEDS)
    if not earlier or earlier[-1]["config"] != config:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "config": config}) + "\n")


def config_at(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The configuration that step `step` of a run was made with; None if the run did not note it."""
    earlier = [line["config"] for line in read_lines(run_dir / STARTS, _NEEDS) if line["step"] < step]
    return earlier[-1] if earlier else None
