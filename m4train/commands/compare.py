"""`m4train compare RUN RUN ...`: runs next to each other, sorted by a metric."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from m4train.inspection.compare import compare as compared
from m4train.inspection.compare import compare_page, compare_table
from m4train.inspection.pages import write
from m4train.run_files import CONFIG
from m4train.terminal import console, fitted


def compare(given: Sequence[str], metric: str | None, mode: str, out: str, as_json: bool) -> int:
    """Prints the table and writes the page of curves (`--out FILE`); a folder of a sweep stands for its runs. Returns 0. Raises
    ConfigError for folders that hold no run, or a metric that no run logs."""
    folders = [folder for name in given for folder in runs_in(Path(name))]
    wanted = metric or ("eval/loss" if _logs(folders, "eval/loss") else "loss")
    found, runs = compared(folders, wanted, mode)
    path = Path(out)
    write(path, compare_page(found, runs, wanted))
    if as_json:
        print(
            json.dumps(
                {"metric": wanted, "page": str(path), "runs": [dataclasses.asdict(one) for one in found]}, indent=1
            )
        )
        return 0
    shown = console()
    for part in fitted(compare_table(found, wanted), shown.width):
        shown.print(part)
    print(f"page: {path}")
    return 0


def runs_in(folder: Path) -> list[Path]:
    """The folder, or, of a sweep, those of its runs."""
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return [folder] if (folder / CONFIG).is_file() or not inside else inside


def _logs(folders: list[Path], name: str) -> bool:
    return any(
        f'"{name}"' in path.read_text(errors="replace") for f in folders if (path := f / "metrics.jsonl").is_file()
    )
