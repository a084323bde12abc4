"""How time and memory grow with what a run is given.

PYTHONPATH=. python benchmarks/growth.py memory [--steps 10000]    # of a real run, over its steps
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from m4train.training.callbacks.base import Callback

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Memory(Callback):
    """Notes every `every` steps the MiB that belong to the trainer alone, and those of all processes that it started."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.begun = time.perf_counter()
        self.rows: list[tuple[int, float, float, float]] = []  # step, trainer, others, seconds

    def on_step_end(self, trainer: Any) -> None:
        if trainer.step % self.every == 0:
            process = psutil.Process()
            own, others = _own(process), sum(map(_own, process.children(recursive=True)))
            self.rows.append((trainer.step, own, others, time.perf_counter() - self.begun))
            print(f"memory after {trainer.step} steps: {own:.1f} MiB", flush=True)

    def slope(self, column: int) -> tuple[float, float]:
        """MiB more for each 1,000 steps in the last three quarters of the run, and the standard error of that."""
        rows = np.array(self.rows[len(self.rows) // 4 :])
        (slope, _), covariance = np.polyfit(rows[:, 0] / 1000, rows[:, column], 1, cov=True)
        return float(slope), float(np.sqrt(covariance[0, 0]))


def _own(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().uss / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def tiny_run(run_dir: Path, data: Path, steps: int, *overrides: str) -> list[str]:
    """A real run of a very small Idefics3 on digits, with held-out losses and checkpoints twenty times."""
    architecture = [
        f"model.architecture.{part}.{key}={value}"
        for part in ("text_config", "vision_config")
        for key, value in TINY.items()
    ]
    return [
        "experiment=digits_pretrain",
        f"run_dir={run_dir}",
        f"data.root={data}",
        *architecture,
        "model.architecture.text_config.num_key_value_heads=1",
        f"trainer.max_steps={steps}",
        f"trainer.save_every={steps // 20}",
        f"trainer.eval_every={steps // 20}",
        "trainer.global_batch_size=2",
        "trainer.micro_batch_size=1",
        "data.sequence_length=96",
        "data.images_per_pack=8",
        "threads=1",
        *overrides,
    ]  # fmt: skip


def memory(steps: int, *overrides: str) -> Memory:
    """Trains `steps` steps and watches."""
    from m4train import load_config, train

    watch = Memory(max(1, steps // 20))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        done = train(load_config(tiny_run(run_dir, Path(folder) / "data", steps, *overrides)), callbacks=[watch])
        assert done.step == steps, done
    return watch


def show_memory(steps: int) -> None:
    watch = memory(steps)
    print("| step | trainer, MiB | its other processes, MiB | seconds |\n| --- | --- | --- | --- |")
    for step, own, others, seconds in watch.rows:
        print(f"| {step:,} | {own:.1f} | {others:.1f} | {seconds:.0f} |")
    for name, column in (("trainer", 1), ("other processes", 2)):
        slope, error = watch.slope(column)
        print(f"{name}: {slope:+.3f} MiB for each 1,000 steps (standard error {error:.3f})")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory"])
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args(arguments)
    show_memory(options.steps)


if __name__ == "__main__":
    main()
