"""Two processes, started by `launch.processes` and by torchrun, train what one process trains.

Each way is taken once with real processes, of which how they end is seen; the others are warm.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import main as torchrun

from m4train import exits
from tests.end_to_end.conftest import small_run
from tests.helpers import warm
from tests.slurm.runs import SITE

pytestmark = pytest.mark.slow
LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 8
TRAIN = ["-m", "m4train", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def _start(digits_root, folder, command, *overrides, **variables):
    arguments = [*small_run(digits_root, folder), f"trainer.max_steps={STEPS}", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *TRAIN, *arguments], **pipes, cwd=folder, env={**os.environ, **variables})


def _warm(folder, *arguments):
    """What `m4train ARGUMENTS` says, with processes whose imports are done."""
    run = warm.start_command(*arguments, folder=folder, ready=2)
    assert run.wait(timeout=240) == 0, run.said()
    assert "Traceback" not in run.said()
    return run.said()


def _losses(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def expected(digits_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run = warm.start_command("train", *small_run(digits_root, folder), f"trainer.max_steps={STEPS}", folder=folder)
    assert run.wait(timeout=240) == 0, run.said()
    return _losses(folder)


def _clean(run, code=0):
    output, errors = run.communicate(timeout=240)
    assert run.returncode == code, errors
    assert "Traceback" not in errors
    assert "terminate called" not in errors
    return output


def test_torchrun(digits_root, expected, tmp_path):
    _clean(_start(digits_root, tmp_path, TORCHRUN, "engine=ddp"))
    assert _losses(tmp_path) == pytest.approx(expected, rel=1e-5)


def test_launch_processes_stops_on_a_signal_and_continues(digits_root, expected, tmp_path):
    """The signal reaches the launcher alone; the run ends with a checkpoint, and the same command finishes it."""
    two = ("engine=ddp", "launch.processes=2")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path / "site"), str(LAUNCH.parent)])
    slow = {"PYTHONPATH": path, "PAUSE": "update:0.5"}  # a signal after the first step comes in time
    run = _start(digits_root, tmp_path, [sys.executable], *two, **slow)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _clean(run, exits.STOPPED_EARLY)
    stopped = len(_losses(tmp_path))
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:06d}").is_dir()
    again = ["train", *small_run(digits_root, tmp_path), f"trainer.max_steps={STEPS}", *two]
    _warm(tmp_path, *again)
    assert _losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    assert _warm(tmp_path, *again).count("trained already") == 1
    kept = {path.name: path.read_text() for path in (tmp_path / "run" / "logs").iterdir()}
    assert set(kept) == {"rank-0.log", "rank-1.log"}
    assert f"step {STEPS}/{STEPS}  loss" in kept["rank-0.log"]
    assert "stopped early by signal" in kept["rank-0.log"]
    assert "step " not in kept["rank-1.log"]
    scores = []
    for processes in ("launch.processes=2", "engine=single"):
        _warm(tmp_path, "evaluate", f"run_dir={tmp_path / 'run'}", "evaluation.max_samples=4", processes)
        scores.append(json.loads((tmp_path / "run" / "evaluation.json").read_text()))
    for source, result in scores[0].items():
        assert result["loss"] == pytest.approx(scores[1][source]["loss"], rel=1e-5)


def test_the_script_for_torchrun_and_the_check_before_a_run(digits_root, tmp_path):
    overrides = [*small_run(digits_root, tmp_path), "engine=ddp"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(LAUNCH.parent), "PROCESSES": "2"}
    command = ["bash", str(LAUNCH / "torchrun.sh"), "launch", "check", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 6


def test_what_cannot_work_is_said_in_a_sentence(digits_root, tmp_path):
    train = ["train", *small_run(digits_root, tmp_path)]
    arguments = ["--nproc_per_node=2", "--standalone", "-m", "m4train", *train]
    run = warm.start(torchrun, arguments, output=tmp_path / "out", folder=tmp_path, ready=2)
    assert run.wait(timeout=120) != 0
    assert "engine.name is single, but 2 processes were started" in run.said()
    run = warm.start_command(*train, "engine=ddp", "launch.processes=2", "optimizer.lr=-1", folder=tmp_path)
    assert run.wait(timeout=60) == 2
