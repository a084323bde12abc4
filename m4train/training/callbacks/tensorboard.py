"""Files for TensorBoard in run_dir/tensorboard; a run that goes on after a kill takes back the steps that it makes again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m4train.config.packages import need
from m4train.run_files import TENSORBOARD
from m4train.training.callbacks.tracker import Tracker, numbers

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class TensorBoard(Tracker):
    """Curves, and held-out answers as text."""

    def begin(self, trainer: Trainer) -> None:
        need("tensorboard", "logging.trackers=tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        folder = trainer.run_dir / TENSORBOARD
        self._writer = SummaryWriter(str(folder), purge_step=trainer.step + 1 if folder.exists() else None)

    def log(self, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics).items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    def on_samples(self, trainer: Trainer, samples: list[dict[str, Any]]) -> None:
        for number, line in enumerate(samples):
            said = (
                f"**{line['question']}**\n\n{line['answer']}\n\n({' | '.join(line['references'])}: {line['score']:g})"
            )
            self._writer.add_text(f"samples/{line['source']}/{number}", said, line["step"])

    def finish(self) -> None:
        self._writer.close()
