"""What a person sees: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from m4train.training.callbacks.base import Callback
from m4train.training.parts_table import format_table, parameter_table

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer, TrainResult


class Console(Callback):
    """Prints on rank 0: the table of parts at the start, then step, loss, tokens per second and time left."""

    def __init__(self, console: RichConsole | None = None) -> None:
        self._console = console or RichConsole(highlight=False, soft_wrap=True, markup=False)
        self._progress: Progress | None = None
        self._main = False
        self._since: tuple[float, int] | None = None  # when the first step ended, which alone has start-up costs

    def on_start(self, trainer: Trainer) -> None:
        self._main = trainer.engine.rank == 0
        if not self._main:
            return
        self._since = None
        table = parameter_table(trainer.model, trainer.config, trainer.engine.device)
        self._console.print(format_table(table), markup=False)
        if trainer.continued:
            self._console.print(trainer.continued, markup=False)
        if self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=self._console)
            self._task = self._progress.add_task("", total=trainer.config.trainer.max_steps, completed=trainer.step)
            self._progress.start()

    def on_step_end(self, trainer: Trainer) -> None:
        if self._since is None:
            self._since = time.perf_counter(), trainer.step
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.step)

    def on_metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if not self._main:
            return
        if "loss" not in metrics:  # before the first step
            self._console.print(
                f"step {trainer.step}  held-out {metrics.get('eval/loss', float('nan')):.4f}", markup=False
            )
            return
        text = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if "eval/loss" in metrics:
            text += f"  held-out {metrics['eval/loss']:.4f}"
        if "epoch" in metrics:
            text += f"  epoch {metrics['epoch']:.2f}"
        if metrics["skipped_steps"]:
            text += f"  skipped {metrics['skipped_steps']}"
        if self._progress is not None:
            # In the scrollback above the bar, whose own line changes
            self._progress.console.print(f"step {trainer.step}  {text}", markup=False)
            self._progress.update(self._task, description=f"loss {metrics['loss']:.4f}", completed=trainer.step)
            return
        self._console.print(
            f"step {trainer.step}/{trainer.config.trainer.max_steps}  {text}{self._left(trainer)}", markup=False
        )

    def _left(self, trainer: Trainer) -> str:
        if self._since is None:
            return ""
        started, first = self._since
        pace = (time.perf_counter() - started) / max(1, trainer.step - first)
        return f"  left {timedelta(seconds=round(pace * (trainer.config.trainer.max_steps - trainer.step)))}"

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        if self._main:
            self._console.print(f"stopped at step {result.step} by {result.stopped_by}", markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
