"""What follows a run from outside: a callback that is made of the run's configuration, and works on rank 0 alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from m4train.config import Config
from m4train.config.wandb_keys import uses_wandb
from m4train.errors import ConfigError
from m4train.trackers import tracker_kind
from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Tracker(Callback):
    """One of one's own overrides `begin`, `log` and `finish`, and of the hooks of Callback what it has a use for:
    `on_samples`, `on_packs`, `on_saved`, `on_failure`, `on_end`, which rank 0 alone calls."""

    def __init__(self, config: Config) -> None:
        self.config, self.active = config, False

    def begin(self, trainer: Trainer) -> None:
        """Before the first step of this start of the run."""

    def log(self, metrics: dict[str, Any]) -> None:
        """The values of `metrics["step"]`. A run that goes on after a kill may log a step once more."""

    def finish(self) -> None:
        """Last of all, also after an error."""

    def on_evaluation(self, name: str, scores: dict[str, dict[str, Any]], lines: list[dict[str, Any]]) -> None:
        """What `m4train evaluate` found of the model `name`: evaluation.json, and the lines of answers.jsonl. No trainer is
        there, and no other hook is called."""

    def on_start(self, trainer: Trainer) -> None:
        if trainer.engine.rank == 0:
            self.begin(trainer)
            self.active = True  # what could not begin has nothing to finish

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if self.active:
            self.log(metrics)

    def close(self) -> None:
        if self.active:
            self.active = False
            self.finish()


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The values that can be drawn as a curve: no texts, such as hashes."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def make_trackers(config: Config) -> list[Tracker]:
    """metrics.jsonl, then the trackers of logging.trackers. Raises ConfigError for one that cannot be made."""
    names = ["jsonl", *(name for name in config.logging.trackers if name != "jsonl")]
    return [_made(name, config) for name in names if name != "wandb" or uses_wandb(config.logging)]


def _made(name: str, config: Config) -> Tracker:
    module, _, kind = tracker_kind(name).make.partition(":")
    try:
        tracker = getattr(importlib.import_module(module), kind)(config)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"logging.trackers names {name}, which cannot be made ({error}).") from error
    if not isinstance(tracker, Tracker):
        raise ConfigError(
            f"logging.trackers names {name}, which is not a Tracker (m4train.training.callbacks.tracker)."
        )
    return tracker
