"""launch/slurm/train.sbatch on a real SLURM of virtual nodes: the numbers of one process, with a signal and a requeue in between."""

import json
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import small_run
from tests.helpers import warm
from tests.slurm.runs import disturbed

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
STEPS = 8
SIZES = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


def _rows(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [(row["loss"], row["data_hash"]) for row in rows]


def test_the_signal_before_the_time_limit_requeues_and_the_run_continues(jobs, digits_root, tmp_path):
    """`scancel --signal=USR1 --batch` sends what `--signal=B:USR1@300` makes SLURM send: the batch script hears it."""
    overrides = [*small_run(digits_root, tmp_path), f"trainer.max_steps={STEPS}"]
    two = [*overrides, "engine=ddp", "logging=offline"]
    slow = disturbed(jobs, PAUSE="update:0.5")  # a signal after the first step comes in time
    job = slow.run("sbatch", "--parsable", "--nodes=2", *SIZES, SCRIPT, *two).stdout.strip()
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, jobs.said(job)
        assert jobs.state(job)[0] in ("PENDING", "CONFIGURING", "RUNNING"), jobs.said(job)
        time.sleep(0.02)
    jobs.run("scancel", "--signal=USR1", "--batch", job)
    one = warm.start_command(
        "train", *overrides, "engine=single", f"run_dir={tmp_path / 'one' / 'run'}", folder=tmp_path
    )
    jobs.wait(job)
    assert jobs.state(job) == ("COMPLETED", 1), jobs.said(job)  # started twice
    said = jobs.said(job)
    assert "told to wind up" in said
    assert f"job {job}, start 2" in said
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.glob(f"m4train-logs/{job}/rank-*.log")} == {"rank-0.log", "rank-1.log"}
    assert one.wait(timeout=240) == 0, one.said()
    expected = _rows(tmp_path / "one")
    got = _rows(tmp_path)
    assert [row[0] for row in got] == pytest.approx([row[0] for row in expected], rel=1e-5)
    assert [row[1] for row in got] == [row[1] for row in expected]


def test_a_job_without_m4train_on_its_path_says_so(jobs):
    environment = {**jobs.environment, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    submitted = type(jobs)(environment, jobs.folder).run("sbatch", "--parsable", "--nodes=1", *SIZES, SCRIPT)
    job = submitted.stdout.strip()
    jobs.wait(job, until=("FAILED",))
    assert "m4train is not on the PATH" in jobs.said(job)
