"""The hooks of the loop. Callbacks run in the order they are listed, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer, TrainResult


class Callback:
    """One optional thing a trainer can do, in its own file. Every hook does nothing unless overridden.

    Order: `load`, `on_start`; per step `on_step_begin`, `measures`, (on logged steps) `measure`, `on_metrics`, then `on_step_end`; at a
    regular end `on_end`, else `on_failure`; `close` in every case.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, when model, optimizer and step are as they will train."""

    def measures(self, step: int) -> bool:
        """Whether this callback wants step `step` logged; the same answer on every rank."""
        return False

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """Metrics to add to those of a logged step; all ranks call it, so it may reduce."""
        return {}

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """The metrics of a logged step."""

    def on_samples(self, trainer: Trainer, samples: list[dict[str, Any]]) -> None:
        """Held-out questions and what the model answers, on rank 0: lines of samples.jsonl."""

    def on_packs(self, trainer: Trainer, lines: list[dict[str, Any]]) -> None:
        """The documents of the first packs, on rank 0 before step 1: see `m4train.inspection.pack_lines`."""

    def on_saved(self, trainer: Trainer, folder: Path) -> None:
        """A checkpoint that is whole and in its place, at a step border after it was asked for."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before the forward passes of an optimizer step, when its batch is there."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After every optimizer step."""

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        """After the last step, however the run was stopped."""

    def on_failure(self, trainer: Trainer, error: BaseException) -> None:
        """Instead of `on_end`, if the run ends by an error."""

    def close(self) -> None:
        """Releases what is held, also after an error."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, as JSON values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Takes `state` back on resume; it is empty in a fresh run."""


class AtEvaluations(Callback):
    """What is measured every `every` steps, at the last one, and `first` before any."""

    def __init__(self, every: int, max_steps: int, first: bool = False) -> None:
        self.every, self.max_steps, self.first = every, max_steps, first

    def measures(self, step: int) -> bool:
        if step == 0:
            return self.first
        return step % self.every == 0 or step == self.max_steps
