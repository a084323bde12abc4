"""launch/slurm/train.sbatch on a real SLURM of virtual nodes: the same numbers as one process, and a signal continues."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import small_run
from tests.helpers import warm

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
STEPS = 12  # so many that a signal after the first one comes in time


def _rows(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"], row["data_hash"]) for row in rows]


def _overrides(digits_root, folder):
    return [*small_run(digits_root, folder), "engine=ddp", f"trainer.max_steps={STEPS}", "logging=offline"]


@pytest.fixture(scope="module")
def finished(cluster, digits_root, tmp_path_factory):
    """What two nodes train when nobody interrupts them, submitted by `m4train launch slurm`."""
    from tests.slurm.conftest import Jobs

    folder = tmp_path_factory.mktemp("whole")
    jobs = Jobs(cluster, folder)
    command = [
        sys.executable,
        "-m",
        "m4train",
        "launch",
        "slurm",
        "--nodes",
        "2",
        "launch.processes=1",
        "--cpus-per-task=1",
    ]
    answer = jobs.run(*command, *_overrides(digits_root, folder)).stdout
    job = re.search(r"Submitted batch job (\d+)", answer)[1]
    jobs.wait(job)
    assert "2 ranks meet at" in jobs.said(job)
    assert {path.name for path in folder.glob(f"m4train-logs/{job}/rank-*.log")} == {"rank-0.log", "rank-1.log"}
    return _rows(folder)


def test_two_nodes_train_what_one_process_trains(finished, digits_root, tmp_path):
    alone = [*_overrides(digits_root, tmp_path), "engine=single", "logging=none"]
    run = warm.start_command("train", *alone, folder=tmp_path)
    assert run.wait(timeout=240) == 0, run.said()
    expected = _rows(tmp_path)
    assert [row[0] for row in finished] == pytest.approx([row[0] for row in expected], rel=1e-5)
    assert [row[2] for row in finished] == [row[2] for row in expected]


def test_the_signal_before_the_time_limit_requeues_and_the_run_continues_exactly(jobs, finished, digits_root, tmp_path):
    """`scancel --signal=USR1 --batch` sends what `--signal=B:USR1@300` makes SLURM send: the batch script hears it."""
    sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    job = jobs.run("sbatch", "--parsable", *sizes, SCRIPT, *_overrides(digits_root, tmp_path)).stdout.strip()
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, jobs.said(job)
        assert jobs.state(job)[0] in ("PENDING", "CONFIGURING", "RUNNING"), jobs.said(job)
        time.sleep(0.02)
    jobs.run("scancel", "--signal=USR1", "--batch", job)
    jobs.wait(job)
    assert jobs.state(job) == ("COMPLETED", 1), jobs.said(job)  # started twice
    said = jobs.said(job)
    assert "told to wind up" in said
    assert f"job {job}, start 2" in said
    assert "Traceback" not in said
    assert _rows(tmp_path) == finished


def test_a_job_without_m4train_on_its_path_says_so(jobs):
    environment = {**jobs.environment, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    job = (
        type(jobs)(environment, jobs.folder)
        .run(
            "sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", SCRIPT
        )
        .stdout.strip()
    )
    jobs.wait(job, until=("FAILED",))
    assert "m4train is not on the PATH" in jobs.said(job)
