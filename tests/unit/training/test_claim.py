"""One run at a time in a run directory."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from m4train.errors import ConfigError
from m4train.training import claim as claiming
from m4train.training.claim import claim
from m4train.training.engines.single import SingleEngine
from tests.helpers.training import make_config

HOLD = """
import sys, time
from pathlib import Path
from m4train.training.claim import _claimed
held = _claimed(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def _engine(run_dir):
    return SingleEngine(make_config(run_dir), "cpu")


def test_a_second_run_is_refused_by_host_and_process_until_the_first_has_died(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert first.stdout.readline() == "held\n"
    for _ in range(2):  # who is refused does not change what the holder wrote
        with pytest.raises(ConfigError, match=f"process {first.pid} on {socket.gethostname()}") as refusal:
            claim(tmp_path, _engine(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with claim(tmp_path, _engine(tmp_path)):
        assert f"process {os.getpid()}" in (tmp_path / "claim").read_text()
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            claim(tmp_path, _engine(tmp_path))
    claim(tmp_path, _engine(tmp_path)).close()


def test_a_job_waits_for_what_is_left_of_its_earlier_start(tmp_path, monkeypatch):
    """As when SLURM no longer hears a node, and starts the job elsewhere while its ranks still run there."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    left = claim(tmp_path, _engine(tmp_path))
    assert (tmp_path / "claim").read_text().endswith(" of job 7\n")
    threading.Timer(0.5, left.close).start()
    claim(tmp_path, _engine(tmp_path)).close()
    held = claim(tmp_path, _engine(tmp_path))
    monkeypatch.setattr(claiming, "_PATIENCE", 0.3)
    with pytest.raises(ConfigError, match="of job 7: wait for it"):
        claim(tmp_path, _engine(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # another job does not wait
    monkeypatch.setattr(claiming, "_PATIENCE", 3600)
    with pytest.raises(ConfigError, match="of job 7: wait for it"):
        claim(tmp_path, _engine(tmp_path))
    held.close()


def test_every_rank_hears_it(tmp_path):
    class Second(SingleEngine):
        rank = 1

        def broadcast(self, value):
            return ConfigError("held")

    with pytest.raises(ConfigError, match="held"):
        claim(tmp_path, Second(make_config(tmp_path), "cpu"))
