"""Checks of `logging`: what follows a run."""

from __future__ import annotations

import re

from m4train.config import Config
from m4train.config.require import at_least, one_of, require
from m4train.config.wandb_keys import ARTIFACTS, MODES, RESUMES, VARIABLES, mode_of, said
from m4train.trackers import TRACKERS

_ID = re.compile(r"[^/\\#?%:]{1,64}")  # what W&B takes for the id of a run


def check_logging(config: Config) -> None:
    """Raises ConfigError for trackers that there are not, and keys of W&B that cannot be."""
    for name in config.logging.trackers:
        if ":" not in name:
            one_of("logging.trackers", name, (*TRACKERS, "package.module:Class"))
    twice = len(set(config.logging.trackers)) < len(config.logging.trackers)
    require(not twice, f"logging.trackers is {config.logging.trackers}, which names one twice: leave it out.")
    at_least("logging.first_packs", config.logging.first_packs, 0)
    wandb = config.logging.wandb
    if "wandb" in config.logging.trackers or wandb.mode is not None:
        one_of("logging.wandb.mode" if wandb.mode is not None else VARIABLES["mode"], mode_of(wandb), MODES)
    if wandb.resume is not None:
        one_of("logging.wandb.resume", wandb.resume, RESUMES)
    one_of("logging.wandb.artifacts", wandb.artifacts, ARTIFACTS)
    given = said(wandb, "id")
    key = "logging.wandb.id" if wandb.id is not None else VARIABLES["id"]
    require(
        given is None or _ID.fullmatch(given) is not None,
        f"{key} is {given!r}, but holds up to 64 letters, digits, - and _.",
    )
    _check_artifacts(config)


def _check_artifacts(config: Config) -> None:
    wandb, trainer = config.logging.wandb, config.trainer
    require(
        wandb.artifacts != "best" or trainer.best.metric is not None,
        "logging.wandb.artifacts is best, but trainer.best.metric is null: name the value that says which is.",
    )
    require(
        wandb.artifacts != "none" or not wandb.by_reference,
        "logging.wandb.by_reference is true, but logging.wandb.artifacts is none: choose last, best or all.",
    )
    kept = isinstance(trainer.save_every, int) and trainer.keep_every and trainer.save_every % trainer.keep_every == 0
    require(
        not wandb.by_reference or wandb.artifacts != "all" or bool(kept),
        "logging.wandb.artifacts=all with by_reference=true refers to checkpoints that trainer.keep_last removes: set "
        "trainer.keep_every to a divisor of trainer.save_every, so that they are kept.",
    )
