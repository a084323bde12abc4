"""Scores of benchmarks on fixed subsets, as metrics that curves show and the best checkpoint is chosen by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Benchmarks(Callback):
    """Adds `eval/benchmark/NAME` and `eval/benchmarks` every `every` steps, at the last one, and `first` before any."""

    def __init__(self, every: int, max_steps: int, first: bool = False) -> None:
        self.every, self.max_steps, self.first = every, max_steps, first

    def measures(self, step: int) -> bool:
        if step == 0:
            return self.first
        return step % self.every == 0 or step == self.max_steps

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        if trainer.benchmarks is None or not (self.measures(trainer.step) or trainer.ending):
            return {}
        trainer.heart.beat("benchmarks", trainer.step)
        trainer.model.eval()
        scores = trainer.benchmarks()
        trainer.model.train()
        return {f"eval/{name}": value for name, value in scores.items()}
