"""`m4train init DIR`: a small project of one's own: conf/, a launch script and a README."""

from __future__ import annotations

import sys
from pathlib import Path

from m4train.errors import ConfigError

_QUESTIONS = {
    "data": ("the file or folder of your data", "data/train.json"),
    "model": ("the model to start from, a choice of model= ", "smolvlm_256m"),
    "epochs": ("passes over the data", "3"),
}
_FILES = {
    "conf/data/mine.yaml": """# Your data; what it holds is found out (docs/data.md).
prepare: null
sequence_length: 2048
sources:
  mine: {{path: "{data}", format: auto}}
""",
    "conf/experiment/mine.yaml": """# Fine-tuning on your data: LoRA on the text model. `m4train config experiment=mine` shows all of it.
defaults:
  - override /model: {model}
  - override /data: mine
  - override /adapter: lora
  - override /freeze: adapted_text

name: mine
trainer: {{epochs: {epochs}, global_batch_size: 8, micro_batch_size: 1, save_every: 0.1}}
schedule: {{warmup_fraction: 0.03}}
optimizer: {{lr: 1.0e-4}}
""",
    "train.sh": """#!/usr/bin/env bash
# Arguments are overrides, such as: ./train.sh optimizer.lr=2e-4
set -euo pipefail
cd "$(dirname "$0")"
m4train validate experiment=mine "$@"
m4train train experiment=mine "$@"
m4train export experiment=mine "$@"
m4train report experiment=mine "$@"
""",
    "README.md": """# A project of m4train

- `conf/data/mine.yaml`: your data; `conf/experiment/mine.yaml`: the run
- `./train.sh`: checks the data, trains, exports and reports; again: goes on where it stopped

Look first, in this folder:

    m4train preview experiment=mine
    m4train plan experiment=mine
""",
}


def init(place: str, data: str | None, model: str | None, epochs: str | None) -> int:
    """Writes the project; asks for what no option says if a person sits at the terminal. Returns 0. Raises ConfigError for a folder
    that holds something already, or a choice that there is not."""
    given = {"data": data, "model": model, "epochs": epochs}
    answers = {name: value or _ask(*_QUESTIONS[name]) for name, value in given.items()}
    folder = Path(place)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something already: name a new folder.")
    _check(answers)
    answers["data"] = str(Path(answers["data"]).absolute()) if Path(answers["data"]).exists() else answers["data"]
    for name, text in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**answers) if name.endswith(".yaml") else text, encoding="utf-8")
    (folder / "train.sh").chmod(0o755)
    print(f"{folder} is made; next: cd {folder} && m4train validate experiment=mine")
    return 0


def _ask(question: str, default: str) -> str:
    return (input(f"{question} [{default}]: ").strip() or default) if sys.stdin.isatty() else default


def _check(answers: dict[str, str]) -> None:
    from m4train.config.compose import groups

    if answers["model"] not in groups()["model"]:
        raise ConfigError(f"--model is {answers['model']}, but must be one of {', '.join(groups()['model'])}.")
    try:
        good = float(answers["epochs"]) > 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"--epochs is {answers['epochs']}, but must be a number above 0.")


def what_next() -> str:
    """What to do next in the working folder."""
    runs = sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    own = sorted(path.stem for path in Path("conf/experiment").glob("*.yaml"))
    lines = []
    if runs:
        run = runs[-1].parent
        lines += [
            f"m4train report run_dir={run}        what came out of the newest run here",
            f"m4train train run_dir={run}         goes on with it, if it has not ended",
        ]
    if own:
        lines.append(f"m4train train experiment={own[0]}      one of {', '.join(own)} in conf/experiment")
    if not lines:
        lines += [
            "m4train init DIR                            a small project for your own data",
            "m4train train experiment=digits_pretrain    a first run, a few minutes on a laptop",
        ]
    return "\n".join(
        ["Next, in this folder:", *(f"  {line}" for line in lines), "", "m4train --help lists the commands."]
    )
