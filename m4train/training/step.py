"""One optimizer step: its micro-batches forward and backward, and the count of updates that were skipped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from m4train.batch import PackedBatch
from m4train.errors import TrainingError
from m4train.training.engines.base import Engine
from m4train.training.metrics import StepSums
from m4train.training.prefetch import on_device


class SkipCounter:
    """Counts non-finite steps on the device; nothing waits for it until somebody reads it."""

    def __init__(self, device: torch.device, total: int = 0) -> None:
        self._total = torch.full((), float(total), device=device)
        self._in_a_row = torch.zeros((), device=device)
        self._longest = torch.zeros((), device=device)

    def update(self, skip: Tensor) -> None:
        """`skip` () is 1.0 if the step was skipped, 0.0 if it was not."""
        self._total += skip
        self._in_a_row = (self._in_a_row + 1.0) * skip
        self._longest = torch.maximum(self._longest, self._in_a_row)

    def read(self) -> tuple[int, int]:
        """Skipped steps since the run began, and the most of them in a row; waits for the device."""
        total, longest = torch.stack([self._total, self._longest]).tolist()
        return int(total), int(longest)


def reseed(seed: int, step: int, rank: int) -> None:
    """Draws of a step (dropout) depend on these three numbers alone, so a resumed run draws the same."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def run_micro_batches(
    engine: Engine,
    micro_batches: Sequence[PackedBatch],
    total: float,
    z_loss: float,
    sums: StepSums | None,
    weigh: Callable[[PackedBatch], PackedBatch] = lambda batch: batch,
    entering: Callable[[str, PackedBatch], None] = lambda stage, batch: None,
) -> None:
    """Forward and backward of all micro-batches of this rank.

    The gradient is that of (sum of losses) / `total`, the number (or the weight) of the loss tokens of the whole optimizer
    step over all ranks. `entering("forward" or "backward", batch)` is called before each. Raises TrainingError for a step
    without micro-batches: ranks must run the same number of them.
    """
    if not micro_batches:
        raise TrainingError(
            "An optimizer step has no micro-batch on this rank; a short rank must get one of weight zero."
        )
    for number, batch in enumerate(on_device(micro_batches, engine.device)):
        last = number == len(micro_batches) - 1
        with engine.accumulation(last):
            entering("forward", batch)
            output = engine.forward(weigh(batch), z_loss)
            entering("backward", batch)
            engine.backward(output.loss / total, last)
        if sums is not None:
            sums.add(batch, output.token_losses)
