"""Held-out loss, as a whole and per source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m4train.errors import TrainingError
from m4train.training.callbacks.base import AtEvaluations
from m4train.training.held_out import held_out_loss

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Evaluation(AtEvaluations):
    """Adds `eval/loss` and `eval/loss/SOURCE` to the metrics every `every` steps, at the last one, and `first` before any."""

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """Raises TrainingError if the trainer has no validation data, or it holds no loss token."""
        if not (self.measures(trainer.step) or trainer.ending):
            return {}
        if trainer.validation is None:
            raise TrainingError("trainer.eval_every is set, but data.validation names no source.")
        trainer.model.eval()
        sources = list(trainer.config.data.validation)
        entering = lambda batch: trainer.heart.beat("evaluation", trainer.step, batch)
        losses = held_out_loss(trainer.engine, trainer.validation(), sources, entering)
        trainer.model.train()
        return {f"eval/{name}": value for name, value in losses.items()}
