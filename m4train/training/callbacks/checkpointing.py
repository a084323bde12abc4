"""Saves a checkpoint every so often, and at the end of the run however it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer, TrainResult


class Checkpointing(Callback):
    """Saves every `every` steps (0: only at the end)."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, trainer: Trainer) -> None:
        if self.every and trainer.step % self.every == 0:
            trainer.save()

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        trainer.save()
