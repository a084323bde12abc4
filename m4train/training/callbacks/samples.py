"""What the model answers to held-out questions while it trains: samples.jsonl, and every callback that shows them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from m4train.json_lines import keep_lines
from m4train.run_files import SAMPLES
from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Samples(Callback):
    """Every `every` steps and at the last one, appends what `trainer.answers()` gives to `run_dir/samples.jsonl`."""

    def __init__(self, every: int, max_steps: int, first: bool = False) -> None:
        self.every, self.max_steps, self.first = every, max_steps, first

    def on_start(self, trainer: Trainer) -> None:
        if trainer.engine.rank == 0:
            keep_lines(trainer.run_dir / SAMPLES, trainer.step)

    def measures(self, step: int) -> bool:
        if step == 0:
            return self.first
        return step % self.every == 0 or step == self.max_steps

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """Adds no metric: the samples go to `on_samples` of all callbacks, on rank 0."""
        if trainer.answers is None or not (self.measures(trainer.step) or trainer.ending):
            return {}
        trainer.heart.beat("generate", trainer.step)
        trainer.model.eval()
        lines = [{"step": trainer.step, **line} for line in trainer.answers()]
        trainer.model.train()
        if lines:
            with (trainer.run_dir / SAMPLES).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            for callback in trainer.callbacks:
                callback.on_samples(trainer, lines)
        return {}
