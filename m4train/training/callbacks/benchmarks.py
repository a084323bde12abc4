"""Scores of benchmarks on fixed subsets, as metrics that curves show and the best checkpoint is chosen by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m4train.training.callbacks.base import AtEvaluations

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Benchmarks(AtEvaluations):
    """Adds `eval/benchmark/NAME` and `eval/benchmarks` every `every` steps, at the last one, and `first` before any."""

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        if trainer.benchmarks is None or not (self.measures(trainer.step) or trainer.ending):
            return {}
        trainer.heart.beat("benchmarks", trainer.step)
        trainer.model.eval()
        scores = trainer.benchmarks()
        trainer.model.train()
        return {f"eval/{name}": value for name, value in scores.items()}
