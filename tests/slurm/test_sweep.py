"""`m4train launch slurm -m`: a sweep is one array of jobs, each with a run directory of its own."""

import json
import re
import sys
import time

import pytest

from tests.end_to_end.conftest import small_run


@pytest.mark.slow
@pytest.mark.full
def test_a_sweep_is_an_array_of_runs(jobs, digits_root, tmp_path):
    sizes = ["--nodes", "1", "launch.processes=1", "--cpus-per-task=1", "--parallel", "1"]
    plain = [word for word in small_run(digits_root, tmp_path) if "max_steps" not in word]
    given = [*plain, "engine=ddp", "trainer.save_every=100", "trainer.max_steps=2,3"]
    answer = jobs.run(sys.executable, "-m", "m4train", "launch", "slurm", "-m", *sizes, *given).stdout
    job = re.search(r"Submitted batch job (\d+)", answer)[1]
    deadline = time.monotonic() + 900
    while jobs.run("squeue", "--noheader", "--jobs", job, check=False).stdout.strip():
        assert time.monotonic() < deadline, jobs.said(f"{job}*")
        time.sleep(0.5)
    rows = {path.parent.name: path.read_text().splitlines() for path in (tmp_path / "run").glob("*/metrics.jsonl")}
    assert sorted(len(lines) for lines in rows.values()) == [2, 3], jobs.said(f"{job}*")
    assert all(json.loads(lines[-1])["step"] == len(lines) for lines in rows.values())
