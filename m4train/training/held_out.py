"""The loss of held-out data, as a whole and per source, under any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from m4train.batch import PackedBatch
from m4train.errors import TrainingError
from m4train.training.engines.base import Engine
from m4train.training.metrics import StepSums
from m4train.training.model_protocol import Step
from m4train.training.prefetch import on_device


@torch.no_grad()
def held_out_loss(
    engine: Engine,
    steps: Iterable[Step],
    sources: Sequence[str],
    entering: Callable[[PackedBatch], None] = lambda batch: None,
) -> dict[str, Any]:
    """`loss`, `loss_tokens` and the same per source (`loss/SOURCE`): means per held-out token, reduced over ranks.

    All ranks call it with equally many batches and a model in evaluation mode; `entering(batch)` is called before each.
    Raises TrainingError if no token carries a loss.
    """
    sums = StepSums(list(sources), engine.device)
    for step in steps:
        for batch in on_device(step.micro_batches, engine.device):
            entering(batch)
            sums.add(batch, engine.forward(batch).token_losses)
    metrics = sums.read(engine.reduce(sums.vector()).tolist())
    if not metrics["loss_tokens"]:
        raise TrainingError("data.validation holds no token that carries a loss; check its sources and their labels.")
    return {name: value for name, value in metrics.items() if name.split("/")[0] in ("loss", "loss_tokens")}
