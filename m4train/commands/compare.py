"""`m4train compare RUN RUN ...`: runs next to each other, sorted by a metric."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from m4train.commands.arguments import taken
from m4train.errors import ConfigError
from m4train.inspection.compare import compare as compared
from m4train.inspection.compare import compare_table, write_compare_page
from m4train.run_files import CONFIG
from m4train.terminal import console

PAGE = "compare.html"


def compare(arguments: list[str]) -> int:
    """Prints the table and writes the page of curves (`--out FILE`); a folder of a sweep stands for its runs. Returns 0. Raises
    ConfigError for folders that hold no run, or a metric that no run logs."""
    metric, arguments = taken(["--metric"], arguments)
    mode, arguments = taken(["--mode"], arguments)
    out, arguments = taken(["--out"], arguments)
    as_json, given = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    if mode not in (None, "min", "max"):
        raise ConfigError(f"--mode is {mode}, but must be min or max.")
    if not given or any(argument.startswith("-") for argument in given):
        raise ConfigError(
            "compare takes the folders of runs: m4train compare RUN RUN ... [--metric eval/loss] [--mode max]."
        )
    folders = [folder for name in given for folder in _runs(Path(name))]
    wanted = metric or ("eval/loss" if _logs(folders, "eval/loss") else "loss")
    found, runs = compared(folders, wanted, mode or "min")
    path = Path(out or PAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_compare_page(path, found, runs, wanted)
    if as_json:
        print(
            json.dumps(
                {"metric": wanted, "page": str(path), "runs": [dataclasses.asdict(one) for one in found]}, indent=1
            )
        )
        return 0
    console().print(compare_table(found, wanted))
    print(f"page: {path}")
    return 0


def _runs(folder: Path) -> list[Path]:
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return [folder] if (folder / CONFIG).is_file() or not inside else inside


def _logs(folders: list[Path], name: str) -> bool:
    return any(
        f'"{name}"' in path.read_text(errors="replace") for f in folders if (path := f / "metrics.jsonl").is_file()
    )
