"""The first packs of a run as its trackers show them: what is trained on, and what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class FirstPacks(Callback):
    """Gives the lines of `trainer.packs()` to `on_packs` of all callbacks, on rank 0, before step 1 and never again."""

    def on_start(self, trainer: Trainer) -> None:
        if trainer.packs is None or trainer.step or trainer.engine.rank:
            return
        lines = trainer.packs()
        for callback in trainer.callbacks:
            callback.on_packs(trainer, lines)
