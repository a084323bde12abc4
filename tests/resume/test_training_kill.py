"""A run that is killed at any moment continues and ends with the same numbers."""

import os
import random
import signal
import time

import pytest

from m4train import durable
from m4train.training.checkpoints import files as checkpoint_files
from m4train.training.checkpoints import save as checkpoint
from m4train.training.checkpoints import saver as saving
from m4train.training.checkpoints.find import find_checkpoint
from tests.helpers import warm
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics

CLOCK = {"tokens_per_second", "data_wait_fraction", "tflops", "tflops/text", "tflops/vision", "memory_gib"}


def _train(run_dir, point="none", when="before", count=1, in_background=True):
    """The tiny run; `point` names a function of the checkpoint module that kills the process before or after its call
    number `count`."""
    calls = 0

    def killing(function):
        def wrapped(*args, **keywords):
            nonlocal calls
            calls += 1
            if calls == count and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **keywords)
            if calls == count and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    if point == "rename":
        checkpoint.os = type("os", (), {"rename": staticmethod(killing(os.rename))})
    elif point != "none":
        setattr(checkpoint, point, killing(getattr(checkpoint, point)))
    extra = lambda folder: (folder / "config.json").write_text("{}")
    config = make_config(run_dir, save_every=2, async_checkpoint=in_background)
    make_trainer(config, TinyModel(dropout=0.1), save_extra=extra).train()


POINTS = ("_make_folder", "_write_tensors", "_write_rest", "write_json", "_verify", "_seal", "write_manifest")
POINTS += ("fsync_tree", "_publish", "rename", "fsync_folder", "_prune", "remove")
# Functions of a save that leave nothing behind, or only pass on to one of the points.
PASSIVE = {"write_checkpoint", "_attempt", "_on_main", "_on_any_rank", "_chunks", "_bits"}
PASSIVE |= {"_revision", "checkpoints_in", "file_hashes", "best_step"}


def _start(run_dir, *kill):
    return warm.start(_train, str(run_dir), *kill, output=run_dir.with_name(f"{run_dir.name}.log"))


def _losses(run_dir):
    return [{key: v for key, v in line.items() if key not in CLOCK} for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    make_trainer(make_config(run_dir, save_every=2), TinyModel(dropout=0.1)).train()
    return _losses(run_dir)


def test_every_point_of_a_save_is_listed(tmp_path, monkeypatch):
    """A stage that is added to a save must be killed in too: what a save calls is seen, not remembered."""
    called = set()

    def seen(name, function):
        def wrapped(*args, **keywords):
            called.add(name)
            return function(*args, **keywords)

        return wrapped

    for name, function in vars(checkpoint).items():
        if callable(function) and getattr(function, "__module__", "") in (
            checkpoint.__name__,
            checkpoint_files.__name__,
            durable.__name__,
        ):
            monkeypatch.setattr(checkpoint, name, seen(name, function))
    monkeypatch.setattr(saving, "write_checkpoint", checkpoint.write_checkpoint)
    monkeypatch.setattr(checkpoint, "os", type("os", (), {"rename": staticmethod(seen("rename", os.rename))}))
    make_trainer(make_config(tmp_path, save_every=2)).train()
    assert called == {*POINTS, *PASSIVE}


# Beside training is the default; the same points within the loop take a kill alike, of which some are tried.
FORMS = [(point, when, True) for point in POINTS for when in ("before", "after")]
FORMS += [(point, "after", False) for point in ("_write_tensors", "write_manifest", "rename")]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "when", "in_background"), FORMS)
def test_killed_at_every_point_of_a_save(point, when, in_background, expected, tmp_path):
    killed = _start(tmp_path, point, when, 4, in_background)
    code = killed.wait(timeout=120)
    assert code == -signal.SIGKILL, f"the point was never reached: {killed.said()}"
    found = find_checkpoint(make_config(tmp_path), lambda sentence: pytest.fail(sentence))
    assert found is not None
    make_trainer(make_config(tmp_path, save_every=2), TinyModel(dropout=0.1)).train()
    assert _losses(tmp_path) == expected
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000010", "step-000012"]


@pytest.mark.slow
def test_killed_at_random_moments(expected, tmp_path):
    generator, kills = random.Random(0), 0
    while True:
        run = _start(tmp_path)
        metrics = tmp_path / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        while run.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before) and kills < 8:
            time.sleep(0.005)  # the interesting moments come after the imports
        time.sleep(generator.uniform(0.0, 0.1))
        if kills < 8:
            run.kill()
        code = run.wait(timeout=120)
        if code == 0:
            break
        assert code == -signal.SIGKILL, run.said()
        kills += 1
    assert kills > 2
    assert _losses(tmp_path) == expected
