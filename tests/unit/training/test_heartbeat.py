"""What the heartbeat watches outside the loop, and how patient it is there; a stuck rank is tested in tests/distributed."""

import subprocess
import sys
import time

import pytest

from m4train import build
from m4train.commands import evaluate as evaluate_run
from m4train.commands import train as run
from m4train.config.compose import load_config
from m4train.training.heartbeat import EXIT_CODE, PATIENCE, Heartbeat

STUCK = """
import sys, time
from pathlib import Path
from m4train.training.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), 0, 1, 0.5) as heart:
    heart.beat(sys.argv[2])
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("stage", "said"), [("index", "for 2 s (4 times trainer.hang_timeout)"), ("update", "for 0 s (t")]
)
def test_stages_of_preparation_have_more_time(stage, said, tmp_path):
    started = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), stage], capture_output=True, text=True, timeout=50
    )
    assert child.returncode == EXIT_CODE, child.stderr
    assert said in child.stderr
    assert f"rank 0: in {stage} of step 0" in child.stderr
    assert time.monotonic() - started > (PATIENCE if stage == "index" else 1) * 0.5


def test_it_starts_once_and_closes_twice(tmp_path):
    with Heartbeat(tmp_path, 0, 1, 60.0) as heart:
        thread = heart._thread
        heart.start()
        assert heart._thread is thread
        heart.close()


class _Reached(Exception):
    pass


@pytest.mark.parametrize(
    ("command", "function", "stage"),
    [
        ("train", "prepare_data", "data"),
        ("train", "build_model", "model"),
        ("train", "build_data", "index"),
        ("evaluate", "prepare_data", "data"),
    ],
)
def test_what_comes_before_the_first_step_is_watched(command, function, stage, monkeypatch, tmp_path):
    beats, watching = [], []
    monkeypatch.setattr(Heartbeat, "beat", lambda self, stage, *_, **__: beats.append(stage))
    monkeypatch.setattr(Heartbeat, "start", lambda self: watching.append(True))

    def reached(*_):
        raise _Reached

    for name in ("prepare_data", "build_processor", "build_model", "build_data"):
        monkeypatch.setattr(build, name, reached if name == function else lambda *_: None)
    config = load_config(["experiment=digits_sft", f"run_dir={tmp_path}", "logging=none"])
    with pytest.raises(_Reached):
        (run.train if command == "train" else evaluate_run.evaluate)(config)
    assert watching
    assert beats[-1] == stage
