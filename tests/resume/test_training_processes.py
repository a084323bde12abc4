"""Runs of two processes under torchrun: they end with code 0, stop together on a signal to one, and survive kills.

How an interpreter ends is seen in real processes; the others are warm.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from torch.distributed.run import main as torchrun

from m4train.training.checkpoints.find import find_checkpoint
from tests.helpers import warm
from tests.helpers.distributed import free_port
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = """
    import os, sys, time
    import torch
    torch.set_num_threads(1)
    from m4train.training.callbacks.base import Callback
    from m4train.training.engines import make_engine
    from tests.helpers.training import TinyModel, make_config, make_trainer

    class Slow(Callback):
        def on_step_end(self, trainer):
            pid = trainer.run_dir / f"pid-{trainer.engine.rank}"
            pid.with_name("writing-" + pid.name).write_text(str(os.getpid()))
            pid.with_name("writing-" + pid.name).rename(pid)  # never seen empty
            time.sleep(float(sys.argv[3]))

    config = make_config(sys.argv[1], save_every=2)
    config.engine.name = sys.argv[2]
    engine = make_engine(config)
    trainer = make_trainer(config, TinyModel(), engine)
    trainer.callbacks.append(Slow())
    os.write(1, f"stopped by {trainer.train().stopped_by}\\n".encode())  # in one piece: both ranks write to one pipe
    engine.shutdown()
"""


def _arguments(run_dir, engine, pause):
    """What torchrun is told."""
    script = run_dir / "script.py"
    run_dir.mkdir(parents=True, exist_ok=True)
    script.write_text(textwrap.dedent(SCRIPT))
    return ["--nproc_per_node=2", f"--master_port={free_port()}", str(script), str(run_dir), engine, str(pause)]


def _start(run_dir, pause=0.0):
    """Torchrun, and the processes it starts, without their imports."""
    files = {"output": run_dir / "torchrun.out", "errors": run_dir / "torchrun.err"}
    arguments = _arguments(run_dir, "ddp", pause)
    for file in files.values():
        file.write_text("")
    return warm.start(torchrun, arguments, **files, folder=ROOT, ready=2, OMP_NUM_THREADS="1")


def _wait_for(path, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists(), f"{path} did not appear"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("single")
    make_trainer(make_config(run_dir), TinyModel()).train()
    return [line["loss"] for line in read_metrics(run_dir)]


def _assert_losses(run_dir, expected):
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param("ddp", marks=pytest.mark.full), pytest.param("fsdp2", marks=pytest.mark.full), "zero2"]
)
def test_torchrun_ends_with_code_zero(engine, expected, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", *_arguments(tmp_path, engine, 0.0)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("stopped by max_steps") == 2
    assert "Traceback" not in run.stderr
    _assert_losses(tmp_path, expected)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(expected, tmp_path):
    run = _start(tmp_path, pause=0.3)
    _wait_for(tmp_path / "pid-1")
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGUSR1)
    assert run.wait(timeout=240) == 0, run.said()
    assert run.said().count("stopped by signal") == 2
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert find_checkpoint(make_config(tmp_path)).step == last < 12
    assert _start(tmp_path).wait(timeout=240) == 0
    _assert_losses(tmp_path, expected)


@pytest.mark.slow
def test_kills_at_random_moments(expected, tmp_path):
    """SIGKILL for one of two processes, the other and the launcher follow; the next start continues. See test_soak.py."""
    generator, kills = random.Random(1), 0
    while kills < 2:
        for old in tmp_path.glob("pid-*"):
            old.unlink()
        run = _start(tmp_path, pause=0.15)
        _wait_for(tmp_path / "pid-1")
        time.sleep(generator.uniform(0.0, 0.8))
        with contextlib.suppress(ProcessLookupError):  # it may have just ended
            victim = tmp_path / f"pid-{generator.randrange(2)}"
            _wait_for(victim)
            os.kill(int(victim.read_text()), signal.SIGKILL)
            kills += 1
        run.wait(timeout=240)
        checkpoint = find_checkpoint(make_config(tmp_path), lambda sentence: pytest.fail(sentence))
        if checkpoint is not None and checkpoint.step == 12:
            break
    run = _start(tmp_path)
    assert run.wait(timeout=240) == 0, run.said()
    _assert_losses(tmp_path, expected)
