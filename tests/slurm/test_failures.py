"""What `m4train launch slurm` does about failures, on a real SLURM of virtual nodes."""

import json
import re
import sys
import time

import psutil
import pytest

from tests.end_to_end.conftest import small_run

pytestmark = pytest.mark.full
STEPS = 16


def submit(jobs, digits_root, folder, *options):
    command = [sys.executable, "-m", "m4train", "launch", "slurm", "--cpus-per-task=1", "launch.processes=1"]
    run = [*small_run(digits_root, folder), f"trainer.max_steps={STEPS}", "trainer.save_every=1"]
    answer = jobs.run(*command, *run, *options).stdout
    return re.findall(r"Submitted batch job (\d+)", answer)


def steps(folder):
    metrics = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def until(condition, jobs, job, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, jobs.said(job)
        time.sleep(0.05)


def ranks(folder, number):
    """The processes of one rank of the run in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if f"run_dir={folder}/run" in process.cmdline() and process.environ().get("RANK") == str(number):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_rank_is_started_again(jobs, digits_root, tmp_path):
    (job,) = submit(jobs, digits_root, tmp_path, "--nodes=2", "engine=ddp")
    until(lambda: len(steps(tmp_path)) >= 2, jobs, job)
    ranks(tmp_path, 1)[0].kill()
    killed = time.monotonic()
    until(lambda: "the ranks start again" in jobs.said(job), jobs, job)
    before = len(steps(tmp_path))
    until(lambda: len(steps(tmp_path)) > before or jobs.state(job)[0] == "COMPLETED", jobs, job)
    print(f"from SIGKILL of a rank to the next step: {time.monotonic() - killed:.1f} s")
    jobs.wait(job)
    assert jobs.state(job) == ("COMPLETED", 0)  # within the job
    assert steps(tmp_path) == list(range(1, STEPS + 1))


def test_an_administrator_may_requeue(jobs, digits_root, tmp_path):
    (job,) = submit(jobs, digits_root, tmp_path)
    until(lambda: len(steps(tmp_path)) >= 2, jobs, job)
    jobs.run("scontrol", "requeue", job)
    jobs.wait(job)
    assert jobs.state(job) == ("COMPLETED", 1)
    assert steps(tmp_path) == list(range(1, STEPS + 1))


def test_a_crash_loop_ends(jobs, digits_root, tmp_path):
    broken = [f"data.sources.documents.path={tmp_path}/nothing.tar", "data.prepare=null", "launch.attempts=2"]
    (tmp_path / "nothing.tar").write_bytes(b"not a tar" * 100)
    (job,) = submit(jobs, digits_root, tmp_path, *broken)
    jobs.wait(job, until=("FAILED",))
    assert "2 starts in a row failed without a new checkpoint" in jobs.said(job)
    assert jobs.said(job).count("2 ranks meet") + jobs.said(job).count("1 ranks meet") == 2


def test_a_chain_goes_on_in_the_next_job(jobs, digits_root, tmp_path):
    first, second = submit(jobs, digits_root, tmp_path, "launch.chain=2")
    until(lambda: len(steps(tmp_path)) >= 2, jobs, first)
    jobs.run("scancel", "--signal=USR1", "--batch", first)
    jobs.wait(first)
    assert "the next job of the chain goes on" in jobs.said(first)
    jobs.wait(second)
    assert steps(tmp_path) == list(range(1, STEPS + 1))


def test_a_bad_node_is_left_out(jobs, digits_root, tmp_path):
    """nvidia-smi, which one of the nodes has a bad card for."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/bash\n[[ $1 == --query-gpu* ]] || exit 0\n"
        '[[ $SLURMD_NODENAME == n1 ]] && ecc=3 || ecc=0\necho "1000, 550, $ecc, Not Active, Not Active"\n'
    )
    program.chmod(0o755)
    jobs = type(jobs)({**jobs.environment, "PATH": f"{tmp_path}:{jobs.environment['PATH']}"}, jobs.folder)
    (first,) = submit(jobs, digits_root, tmp_path, "--nodelist=n1", "launch.exclude_bad_nodes=true")
    jobs.wait(first, until=("COMPLETED", "FAILED"))
    said = jobs.said(first)
    assert "bad node n1: GPU 0 has 3 uncorrected ECC errors" in said
    assert (tmp_path / "run" / "slurm" / "bad_nodes").read_text().split() == ["n1"]
