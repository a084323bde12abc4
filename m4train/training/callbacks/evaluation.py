"""Held-out loss, as a whole and per source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from m4train.errors import TrainingError
from m4train.training.callbacks.base import Callback
from m4train.training.metrics import StepSums

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Evaluation(Callback):
    """Adds `eval/loss` and `eval/loss/SOURCE` to the metrics every `every` steps and at the last one."""

    def __init__(self, every: int, max_steps: int) -> None:
        self.every, self.max_steps = every, max_steps

    def measures(self, step: int) -> bool:
        return step % self.every == 0 or step == self.max_steps

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        return held_out_loss(trainer) if self.measures(trainer.step) else {}


@torch.no_grad()
def held_out_loss(trainer: Trainer) -> dict[str, Any]:
    """Mean loss per held-out token, reduced over ranks; all ranks call it and have equally many batches.

    Raises TrainingError where the trainer has no validation data, or it holds no loss token.
    """
    if trainer.validation is None:
        raise TrainingError("trainer.eval_every is set, but data.validation names no source.")
    engine = trainer.engine
    sums = StepSums(list(trainer.config.data.validation), engine.device)
    trainer.model.eval()
    for step in trainer.validation():
        for batch in step.micro_batches:
            trainer.heart.beat("evaluation", trainer.step, batch)
            batch = batch.to(engine.device, non_blocking=True)
            sums.add(batch, engine.forward(batch).token_losses)
    trainer.model.train()
    metrics = sums.read(engine.reduce(sums.vector()).tolist())
    if not metrics["loss_tokens"]:
        raise TrainingError("data.validation holds no token that carries a loss; check its sources and their labels.")
    return {f"eval/{name}": value for name, value in metrics.items() if name.split("/")[0] in ("loss", "loss_tokens")}
