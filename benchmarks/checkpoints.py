"""What a checkpoint costs the loop, written within it and alongside it: python benchmarks/checkpoints.py

A model of 57 M parameters (checkpoints of 690 MB) trains 12 steps and saves after steps 4 and 8, and at the end.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from m4train.training.callbacks.base import Callback
from m4train.training.trainer import Trainer
from tests.helpers import training


class Clock(Callback):
    """Seconds of each step, saves and all."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        self.ends.append(time.perf_counter())


def run(save_every: int, in_background: bool) -> tuple[float, float, float]:
    """Seconds of steps 4 to 11, of which `save` kept the loop waiting, and of the whole run."""
    waited = 0.0
    save = Trainer.save

    def timed(trainer: Trainer) -> None:
        nonlocal waited
        before = time.perf_counter()
        save(trainer)
        if trainer.step < trainer.config.trainer.max_steps:
            waited += time.perf_counter() - before

    with tempfile.TemporaryDirectory() as scratch:
        config = training.make_config(
            scratch, save_every=save_every, async_checkpoint=in_background, worst_batch_first=False
        )
        clock, model = Clock(), training.TinyModel()
        trainer = training.make_trainer(config, model)
        trainer.callbacks.append(clock)
        Trainer.save = timed  # type: ignore[method-assign]
        started = time.perf_counter()
        try:
            trainer.train()
        finally:
            Trainer.save = save  # type: ignore[method-assign]
        return clock.ends[10] - clock.ends[2], waited, time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(1)
    training.HIDDEN, training.VOCABULARY = 1024, 16384
    for name, every, in_background in (
        ("none before the end", 100, False),
        ("within", 4, False),
        ("alongside", 4, True),
    ):
        steps, waited, whole = run(every, in_background)
        print(f"saves {name}: eight steps {steps:.1f} s, waiting for saves {waited:.2f} s, whole run {whole:.1f} s")


if __name__ == "__main__":
    main()
