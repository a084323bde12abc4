"""Folders of models that are artifacts of Weights & Biases: `wandb:ENTITY/PROJECT/NAME:best`."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from m4train.errors import ConfigError

FROM = "wandb:"


@cache
def artifact_folder(name: str) -> Path:
    """Where the files of an artifact are after a download, in WANDB_ARTIFACT_DIR or ./artifacts; of files that are there already
    only what changed is fetched. Raises ConfigError if there is no such artifact within reach."""
    from filelock import FileLock

    from m4train.config.packages import need

    need("wandb", f"model.pretrained={name}")
    import wandb

    wanted = name.removeprefix(FROM)
    if wanted.count("/") != 2:
        raise ConfigError(
            f"{name} is not an artifact of W&B: its form is wandb:ENTITY/PROJECT/NAME:best, or :latest, or :v3."
        )
    try:
        found = wandb.Api().artifact(wanted)
        folder = Path(os.environ.get("WANDB_ARTIFACT_DIR") or "artifacts") / found.source_name.replace(":", "-")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # of all ranks of a machine one fetches
            found.download(str(folder))
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise ConfigError(f"{name} is not within reach ({error}): run `wandb login`, or correct the name.") from error
    return folder
