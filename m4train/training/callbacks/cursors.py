"""cursors.jsonl: where the plan of the data was every so often, so that any step is replayed from nearby."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from m4train.json_lines import keep_lines
from m4train.run_files import CURSORS
from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer

EVERY = 50  # steps: planned again in well under a second, and a state takes kilobytes


class Cursors(Callback):
    """Appends the state of the plan to `run_dir/cursors.jsonl` on rank 0; streamed data has none to go back to."""

    def on_start(self, trainer: Trainer) -> None:
        if trainer.engine.rank == 0:
            earlier = keep_lines(trainer.run_dir / CURSORS, trainer.step)
            if not earlier or earlier[-1]["step"] != trainer.step:
                self._write(trainer)  # with another mixture from here on, no earlier one leads to the steps that come

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.engine.rank == 0 and trainer.step % EVERY == 0:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if "plan" in trainer.plan_state:
            with (trainer.run_dir / CURSORS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(trainer.plan_state) + "\n")
