"""Runs that are killed again and again, at random moments, under changing engines, numbers of processes and keys, some of which go
back to an earlier checkpoint: their steps and losses are those of a run that was left alone.

    OMP_NUM_THREADS=1 python -m tests.soak.soak 200 [SEED]

Not part of the tests: it takes hours. Prints a line for every run and a table of what was killed at the end.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from m4train.training.checkpoints.files import checkpoints_in
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.engines import make_engine
from tests.helpers.distributed import end_ranks, start_ranks
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics

STEPS = 120
ENGINES = [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
CHANGES = {  # keys that may change between two starts and change no number but by rounding
    "save_every": (1, 2, 3, 5),
    "keep_last": (1, 2, 3),
    "micro_batch_size": (1, 2, 3),
    "async_checkpoint": (False, True),
    "gradient_checkpointing": (False, True),
}
NEAR = 1e-6  # relative: sums in another order


def _config(run_dir: str, changes: dict, engine: str = "single", resume: str = "auto"):
    config = make_config(run_dir, max_steps=STEPS)
    for key, value in changes.items():
        setattr(config.trainer, key, value)
    config.engine.name, config.resume = engine, resume
    config.optimizer.lr, config.optimizer.eps = (
        1e-3,
        1e-6,
    )  # Adam makes full steps of gradients that are zero but for rounding
    return config


def _train(run_dir: str, engine: str, changes: dict, resume: str) -> None:
    config = _config(run_dir, changes, engine, resume)
    made = make_engine(config)
    extra = lambda folder: (folder / "config.json").write_text("{}")
    make_trainer(config, TinyModel(), made, save_extra=extra).train()
    made.shutdown()


class Run:
    """One run directory, started as often as it is killed."""

    def __init__(self, folder: Path, chance: random.Random, counts: Counter) -> None:
        self.run_dir, self.chance, self.counts, self.starts = folder / "run", chance, counts, 0

    def cycle(self, kill: bool) -> bool:
        """One start, killed if it has not ended before; returns whether the run is complete."""
        engine, world = self.chance.choice(ENGINES)
        changes = {key: self.chance.choice(values) for key, values in CHANGES.items()}
        resume = self._earlier() if kill and self.chance.random() < 0.15 else "auto"
        self.starts += 1
        scratch = self.run_dir.parent / f"start-{self.starts}"
        scratch.mkdir(parents=True)
        ranks = start_ranks(_train, world, str(self.run_dir), engine, changes, resume, folder=scratch)
        try:
            if not kill:
                while any(rank.poll() is None for rank in ranks):
                    time.sleep(0.05)
            else:
                self._wait(ranks, self.chance.choice((0, 1, 3, 6, 10)))
            if all(rank.poll() == 0 for rank in ranks):
                return True
            failed = [rank.said() for rank in ranks if rank.poll() not in (None, 0)]
            assert not failed, failed[0]
            victims = self.chance.choice((ranks, ranks[:1], ranks[-1:]))
            for rank in victims:
                rank.kill()
            codes = {rank.wait(timeout=30) for rank in victims}
            self.counts[f"{engine}, {'all' if len(victims) == world else 'one'}"] += -signal.SIGKILL in codes
            self.counts["went back"] += resume != "auto"
            time.sleep(self.chance.choice((0.0, 0.5)))
        finally:
            end_ranks(ranks)
        # no kill leaves a checkpoint that looks whole and is not
        find_checkpoint(_config(str(self.run_dir), {}), lambda sentence: sys.exit(sentence))
        return False

    def _wait(self, ranks: list, more: int) -> None:
        """Until this start has written `more` lines, or ended, and a moment longer."""
        metrics = self.run_dir / "metrics.jsonl"
        lines = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        seen = newest = lines()
        written, deadline = 0, time.monotonic() + 200
        while written < more and all(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.005)
            newest, before = lines(), newest
            written += max(0, newest - before)  # a start takes lines out before it adds its own
        time.sleep(self.chance.uniform(0.0, 0.3 if seen else 3.0))

    def _earlier(self) -> str:
        found = [path for _, path in checkpoints_in(self.run_dir / "checkpoints")]
        return str(self.chance.choice(found)) if found else "auto"


def _compare(run_dir: Path, expected: list[dict]) -> float:
    """The largest relative difference of a loss; every step is there once, in order, with the same data."""
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["data_hash"] for line in lines] == [line["data_hash"] for line in expected]
    far = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(lines, expected, strict=True))
    assert far < NEAR, far
    return far


def main() -> None:
    """Kills runs until enough were killed."""
    wanted, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    chance, counts, begun, farthest, runs = random.Random(seed), Counter(), time.monotonic(), 0.0, 0
    kills = lambda: sum(count for name, count in counts.items() if ", " in name)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        _train(str(whole), "single", {}, "auto")
        expected = read_metrics(whole)
        while kills() < wanted:
            runs += 1
            run = Run(Path(scratch) / f"run-{runs}", chance, counts)
            while not run.cycle(kill=kills() < wanted):
                pass
            far = _compare(run.run_dir, expected)
            farthest = max(farthest, far)
            took = time.monotonic() - begun
            print(
                f"run {runs}: {run.starts} starts, losses within {far:.0e}; {kills()} kills in {took:.0f} s", flush=True
            )
    for name, count in sorted(counts.items()):
        print(f"| {name} | {count} |")
    print(f"{runs} runs of {STEPS} steps, {kills()} kills, losses within {farthest:.0e}")


if __name__ == "__main__":
    main()
