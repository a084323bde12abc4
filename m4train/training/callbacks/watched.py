"""What follows from a logged value: the best checkpoint is kept, and a run that no longer gets better ends."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from m4train.config import BestConfig, EarlyStoppingConfig
from m4train.errors import TrainingError
from m4train.run_files import BEST
from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class _Watched(Callback):
    """The best value so far of a metric, and how many values came since."""

    def __init__(self, key: str, metric: str, mode: str, min_change: float = 0.0) -> None:
        self._key, self.metric, self._sign, self._change = key, metric, -1.0 if mode == "max" else 1.0, min_change
        self.best: float | None = None
        self.since = 0

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Raises TrainingError if a run that has measured everything does not log the metric."""
        value = metrics.get(self.metric)
        if value is None:
            if not trainer.config.trainer.eval_every or any(name.startswith("eval/") for name in metrics):
                raise TrainingError(
                    f"{self._key} is {self.metric}, which this run does not log; it logs {', '.join(sorted(metrics))}."
                )
            return
        if math.isfinite(value) and (self.best is None or self._sign * (self.best - value) > self._change):
            self.best, self.since = value, 0
            self.on_better(trainer)
        else:
            self.since += 1

    def on_better(self, trainer: Trainer) -> None:
        """The value is better than all before."""

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since}

    def load(self, state: dict[str, Any]) -> None:
        self.best, self.since = state.get("best"), state.get("since", 0)


class Best(_Watched):
    """Saves a checkpoint whenever the metric is better than ever, and keeps it: checkpoints/best.json names it."""

    def __init__(self, config: BestConfig) -> None:
        super().__init__("trainer.best.metric", str(config.metric), config.mode)
        self._better = False

    def on_better(self, trainer: Trainer) -> None:
        self._better = True

    def on_step_end(self, trainer: Trainer) -> None:
        if not self._better:
            return
        self._better = False
        trainer.save()
        if trainer.engine.rank == 0:
            path = trainer.run_dir / BEST
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": trainer.step, "metric": self.metric, "value": self.best}) + "\n")


class EarlyStopping(_Watched):
    """Ends the run when the metric has not become better for `patience` of its values."""

    def __init__(self, config: EarlyStoppingConfig) -> None:
        super().__init__("trainer.early_stopping.metric", config.metric, config.mode, config.min_change)
        self._patience = config.patience

    def on_start(self, trainer: Trainer) -> None:
        self._ask(trainer)  # a run that had ended so before is not trained on

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        super().on_metrics(trainer, metrics)
        self._ask(trainer)

    def _ask(self, trainer: Trainer) -> None:
        if self.since >= self._patience:
            trainer.ask_to_stop()
