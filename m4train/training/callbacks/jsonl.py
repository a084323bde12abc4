"""metrics.jsonl: one object per logged step, each step once however often the run was resumed."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any, TextIO

from m4train.json_lines import keep_lines
from m4train.run_files import METRICS
from m4train.training.callbacks.tracker import Tracker

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Jsonl(Tracker):
    """Appends to `run_dir/metrics.jsonl`; on resume, what a killed run logged after its checkpoint is cut off."""

    _file: TextIO
    _step = _before = 0  # the step of the last line, and where that line begins

    def begin(self, trainer: Trainer) -> None:
        path = trainer.run_dir / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_lines(path, trainer.step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self._step:  # the same step with more about it
            self._file.truncate(self._before)
        self._step, self._before = metrics["step"], self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps({key: _finite(value) for key, value in metrics.items()}) + "\n")
        self._file.flush()

    def finish(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """The value, or null if JSON has no word for it, as for the gradient norm of a skipped step."""
    return value if not isinstance(value, float) or math.isfinite(value) else None
