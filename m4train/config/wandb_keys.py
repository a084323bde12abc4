"""Which value W&B gets: that of the key, else that of W&B's own variable, else the one that m4train gives."""

from __future__ import annotations

import os
from typing import Any

from m4train.config import LoggingConfig, WandbConfig

# key -> the variable that is read if it is not set
VARIABLES = {
    "mode": "WANDB_MODE",
    "entity": "WANDB_ENTITY",
    "project": "WANDB_PROJECT",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "name": "WANDB_NAME",
    "id": "WANDB_RUN_ID",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "dir": "WANDB_DIR",
    "resume": "WANDB_RESUME",
    "save_code": "WANDB_SAVE_CODE",
}
ARTIFACTS = ("none", "last", "best", "all")
# Not shared: W&B counts the steps of such a run itself, and a restart would count them again.
MODES = ("online", "offline", "disabled")
RESUMES = ("allow", "must", "never", "auto")
_OTHER_NAMES = {"run": "online", "dryrun": "offline"}  # of modes, in W&B's variable


def said(config: WandbConfig, key: str) -> Any:
    """The value of a key, else the text of its variable, else None."""
    value = getattr(config, key)
    if value is not None and value != []:
        return value
    return os.environ.get(VARIABLES[key]) or None


def options(config: WandbConfig, **otherwise: Any) -> dict[str, Any]:
    """The arguments of wandb.init: each key that is set; if neither it nor its variable is, what `otherwise` gives. W&B
    reads its variables itself."""
    keys = {
        "entity": config.entity,
        "project": config.project,
        "group": config.group,
        "job_type": config.job_type,
        "name": config.name,
        "id": config.id,
        "tags": config.tags,
        "notes": config.notes,
        "dir": config.dir,
        "resume": config.resume,
        "save_code": config.save_code,
    }
    given = {key: value for key, value in keys.items() if value is not None and value != []}
    found = given | {key: value for key, value in otherwise.items() if said(config, key) is None and value is not None}
    return found | {"mode": mode_of(config)}


def mode_of(config: WandbConfig) -> str:
    """online, offline or disabled."""
    if config.mode is None and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    mode = said(config, "mode") or "offline"
    return _OTHER_NAMES.get(mode, mode)


def uses_wandb(logging: LoggingConfig) -> bool:
    """Whether a run logs to W&B: its configuration and W&B's own variables can both say no."""
    return "wandb" in logging.trackers and mode_of(logging.wandb) != "disabled"
