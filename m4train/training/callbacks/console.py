"""What a person sees: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole

from m4train.terminal import Bars, stage
from m4train.training.callbacks.base import Callback
from m4train.training.parts_table import format_table, parameter_table

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer, TrainResult

_SAID = {"evaluation": "held-out loss", "generate": "answering", "save": "saving"}  # stages that a step does not show


class Console(Callback):
    """Prints on rank 0: the table of parts at the start, then step, loss, tokens per second and time left."""

    def __init__(self, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole(highlight=False, soft_wrap=True, markup=False)
        self._bars: Bars | None = None
        self._main = False
        self._loss = ""
        self._since = 0.0, 0  # when the first step ended, and its number

    def on_start(self, trainer: Trainer) -> None:
        self._main = trainer.engine.rank == 0
        if not self._main:
            return
        stage(None)  # rich does not print above the line of another console
        table = parameter_table(trainer.model, trainer.config, trainer.engine.device)
        self._console.print(format_table(table, self._console.width if self._console.is_terminal else None))
        if trainer.continued:
            self._console.print(trainer.continued)

    def on_step_end(self, trainer: Trainer) -> None:
        if not self._main:
            return
        if self._bars is None:  # after the first step, which alone has start-up costs
            self._since = time.perf_counter(), trainer.step
            self._bars = Bars("steps", self._console)
            self._task = self._bars.add_task("", total=trainer.config.trainer.max_steps, completed=trainer.step)
            self._bars.start()
            trainer.heart.changed = self._describe
        self._bars.update(self._task, completed=trainer.step)

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if not self._main:
            return
        stage(None)
        if "loss" not in metrics:  # before the first step
            self._console.print(f"step {trainer.step}  held-out {metrics.get('eval/loss', float('nan')):.4f}")
            return
        text = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if "eval/loss" in metrics:
            text += f"  held-out {metrics['eval/loss']:.4f}"
        if "epoch" in metrics:
            text += f"  epoch {metrics['epoch']:.2f}"
        if metrics["skipped_steps"]:
            text += f"  skipped {metrics['skipped_steps']}"
        self._loss = f"loss {metrics['loss']:.4f}"
        if self._console.is_terminal:  # in the scrollback above the bar, whose own line changes
            self._console.print(f"step {trainer.step}  {text}")
            return
        self._console.print(f"step {trainer.step}/{trainer.config.trainer.max_steps}  {text}{self._left(trainer)}")
        if self._bars is not None:
            self._bars.postpone()

    def _describe(self, stage: str) -> None:
        if self._bars is not None:
            self._bars.update(self._task, description=_SAID.get(stage, self._loss))

    def _left(self, trainer: Trainer) -> str:
        if self._bars is None:
            return ""
        pace = (time.perf_counter() - self._since[0]) / max(1, trainer.step - self._since[1])
        return f"  left {timedelta(seconds=round(pace * (trainer.config.trainer.max_steps - trainer.step)))}"

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        if self._main:
            self.close()
            self._console.print(f"stopped at step {result.step} by {result.stopped_by}")

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
