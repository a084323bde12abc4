"""A run of two processes that is killed again and again, at random moments and at every point of a save, by SIGKILL to
either process, ends with the numbers of a run that was left alone, to the last bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from m4train.training.checkpoints import save as checkpoint
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.engines import make_engine
from tests.helpers.distributed import end_ranks, start_ranks
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics
from tests.resume.test_training_kill import CLOCK, POINTS

MEASURED = CLOCK | {"memory_gib"}  # not computed from the data
ON_EVERY_RANK = ("_write_tensors", "_verify")  # the other points of a save belong to rank 0


def _config(run_dir, steps):
    config = make_config(run_dir, max_steps=steps, save_every=2)
    config.engine.name = "ddp"
    return config


def _train(run_dir, steps, victim=None, point=None, when=None):
    """One rank of the run; `victim` kills itself before or after its first call of `point`."""
    if point is not None and int(os.environ["RANK"]) == victim:
        _arm(point, when)
    config = _config(run_dir, steps)
    engine = make_engine(config)
    extra = lambda folder: (folder / "config.json").write_text("{}")
    make_trainer(config, TinyModel(dropout=0.1), engine, save_extra=extra).train()
    engine.shutdown()


def _arm(point, when):
    function = os.rename if point == "rename" else getattr(checkpoint, point)

    def killing(*args, **keywords):
        if when == "after":
            function(*args, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "rename":
        checkpoint.os = type("os", (), {"rename": staticmethod(killing)})
    else:
        setattr(checkpoint, point, killing)


class Soak:
    """A run of `steps` steps in one folder, started as often as it is killed."""

    def __init__(self, folder, steps):
        self.run_dir, self.steps, self.starts = folder / "run", steps, 0

    def start(self, *kill):
        self.starts += 1
        folder = self.run_dir.parent / f"start-{self.starts}"
        folder.mkdir()
        return start_ranks(_train, 2, str(self.run_dir), self.steps, *kill, folder=folder)

    def kill_at(self, victim, point, when):
        ranks = self.start(victim, point, when)
        try:
            code = ranks[victim].wait(timeout=200)
            assert code == -signal.SIGKILL, f"{when} {point} was never hit on rank {victim}: {ranks[victim].said()}"
            self._leave(ranks)
        finally:
            end_ranks(ranks)
        self.check()

    def kill_at_random(self, generator):
        """At any moment of the first dozen of steps, with their saves, that this start makes."""
        wanted = self._lines() + generator.randint(1, 12)
        ranks = self.start()
        try:
            deadline = time.monotonic() + 200
            while self._lines() < wanted and ranks[0].poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(generator.uniform(0.0, 0.05))
            victim = generator.randrange(2)
            ranks[victim].kill()
            assert ranks[victim].wait(timeout=30) == -signal.SIGKILL, ranks[victim].said()
            self._leave(ranks)
        finally:
            end_ranks(ranks)
        self.check()

    def finish(self):
        ranks = self.start()
        try:
            codes = [child.wait(timeout=300) for child in ranks]
        finally:
            end_ranks(ranks)
        assert codes == [0, 0], ranks[0].said() + ranks[1].said()
        return [{key: v for key, v in line.items() if key not in MEASURED} for line in read_metrics(self.run_dir)]

    def check(self):
        """No kill leaves a checkpoint that looks whole and is not."""
        find_checkpoint(_config(self.run_dir, self.steps), lambda sentence: pytest.fail(sentence))

    def _lines(self):
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def _leave(self, ranks):
        """The other rank has a moment to end by itself, as launchers give it."""
        deadline = time.monotonic() + 1.0
        while any(child.poll() is None for child in ranks) and time.monotonic() < deadline:
            time.sleep(0.01)


def _soak(folder: Path, steps, moments, kills):
    soak = Soak(folder, steps)
    generator = random.Random(3)
    for kill in kills:
        soak.kill_at(*kill)
    for _ in range(moments):
        soak.kill_at_random(generator)
    whole = folder / "whole"
    whole.mkdir()
    expected = Soak(whole, steps).finish()
    assert [line["step"] for line in expected] == list(range(1, steps + 1))
    for line, wanted in zip(soak.finish(), expected, strict=True):
        differ = {key: (line.get(key), wanted[key]) for key in wanted if line.get(key) != wanted[key]}
        assert not differ, f"step {wanted['step']}"


EVERY = [(0, point, when) for point in POINTS for when in ("before", "after")]
EVERY += [(1, point, when) for point in ON_EVERY_RANK for when in ("before", "after")]


@pytest.mark.slow
def test_a_few_kills(tmp_path):
    """One kill on either rank while writing, one about the rename, two at random moments."""
    kills = [(1, "_write_tensors", "after"), (0, "rename", "before"), (0, "rename", "after")]
    _soak(tmp_path, 60, 2, kills)


@pytest.mark.slow
@pytest.mark.full
def test_kills_at_every_point_and_at_twenty_random_moments(tmp_path):
    _soak(tmp_path, 400, 20, EVERY)
