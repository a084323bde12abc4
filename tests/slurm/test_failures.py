"""What `m4train launch slurm` does about failures, on a real SLURM of virtual nodes: every step is made once, with the losses of
a run that nothing disturbs."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import small_run
from tests.helpers import warm
from tests.slurm.conftest import on_node
from tests.slurm.runs import STEPS, Run, disturbed

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def losses(digits_root, tmp_path_factory):
    """Of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = [*small_run(digits_root, folder), f"trainer.max_steps={STEPS}", "engine=single"]
    run = warm.start_command("train", *options, folder=folder)
    assert run.wait(timeout=300) == 0, run.said()
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def same(losses):
    return lambda run: run.losses() == pytest.approx(losses, rel=1e-5)


def test_a_killed_rank_is_started_again(jobs, digits_root, same):
    run = Run(jobs, digits_root, nodes=2)
    run.begun()
    run.ranks(1)[0].kill()
    killed = time.monotonic()
    run.until(lambda: "the ranks start again" in run.said())
    before = len(run.steps())
    run.until(lambda: len(run.steps()) > before or jobs.state(run.job)[0] == "COMPLETED")
    seconds = time.monotonic() - killed
    # Under 60 s on cores that nothing else uses; a time says nothing on others, so it is shown only (`run.until` ends a hang).
    print(f"from SIGKILL of a rank to the next step: {seconds:.1f} s, with a load of {os.getloadavg()[0]:.1f}")
    jobs.wait(run.job)
    assert jobs.state(run.job) == ("COMPLETED", 0)  # within the job
    assert f"rank 1: Killed; it was on {run.nodes()[1]}, in " in run.said()
    assert same(run)


def test_a_rank_that_dies_twice_names_its_samples_and_leaving_them_out_goes_on(jobs, digits_root):
    run = Run(disturbed(jobs, DEADLY="1:3"), digits_root, "launch.attempts=2", nodes=2)
    jobs.wait(run.job, until=("FAILED",))
    deaths = [json.loads(line) for line in (run.folder / "deaths.jsonl").read_text().splitlines()]
    assert [death["rank"] for death in deaths] == [1, 1]
    assert [death["step"] for death in deaths] == [3, 3]
    node = run.nodes()[1]
    log = next(jobs.folder.glob(f"*-{run.job}.log")).read_text().splitlines()
    (line,) = (line for line in log[-6:] if "a rank died before with" in line)
    assert f"rank 1: Killed; it was on {node}, in forward of step 3, and a rank died before with" in line
    assert all(f":{key} in {shard}" in line for _, key, shard in deaths[-1]["samples"][:8])
    shown = jobs.m4train("launch", "logs", run.folder).stdout
    assert shown.index("rank-1.log") < shown.index("rank-0.log")


def test_an_administrator_may_requeue(jobs, digits_root, same):
    run = Run(jobs, digits_root)
    run.begun()
    jobs.run("scontrol", "requeue", run.job)
    jobs.wait(run.job)
    assert jobs.state(run.job) == ("COMPLETED", 1)
    assert same(run)


def test_a_requeue_during_a_save(jobs, digits_root, same):
    run = Run(disturbed(jobs, PAUSE="save:2"), digits_root, "trainer.save_every=4")
    run.until(lambda: len(run.steps()) == 4)
    time.sleep(0.5)  # the save has begun, and is held up
    jobs.run("scontrol", "requeue", run.job)
    jobs.wait(run.job)
    assert jobs.state(run.job) == ("COMPLETED", 1)
    assert same(run)


def test_the_time_limit_is_no_end(jobs, digits_root, same):
    """SLURM itself sends the signal, up to a minute before the time that was asked for."""
    options = ("--time=2", "--signal=B:USR1@30")
    run = Run(disturbed(jobs, PAUSE="update:6"), digits_root, *options)
    jobs.wait(run.job)
    assert jobs.state(run.job)[1] >= 1
    said = run.said()
    assert "told to wind up" in said
    assert "DUE TO TIME LIMIT" not in said
    assert same(run)


@pytest.mark.parametrize("which", [0, 1])
def test_a_node_that_no_longer_answers(which, cluster, spaces, jobs, digits_root, same):
    """slurmd is killed, of the node of the batch script or of the other one: SLURM calls the node down and requeues the job."""
    run = Run(disturbed(jobs, PAUSE="update:3"), digits_root, nodes=2)
    run.begun()
    lost = run.nodes()[which]
    pid = int((Path(cluster["SLURM_CONF"]).parent / f"slurmd-{lost}.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    try:
        jobs.wait(run.job)
        assert jobs.state(run.job) == ("COMPLETED", 1)
        assert lost not in run.nodes()
        assert same(run)
    finally:
        on_node(cluster, lost, "slurmd", "-N", lost)


def test_a_crash_loop_ends(jobs, digits_root):
    run = Run(disturbed(jobs, DEADLY="0:1"), digits_root, "launch.attempts=2")
    jobs.wait(run.job, until=("FAILED",))
    assert "failure 1 of 2: the ranks start again" in run.said()
    assert "2 starts in a row failed without a new checkpoint: the job ends" in run.said()
    assert run.said().count("1 ranks meet") == 2
    assert not run.steps()


def test_a_chain_goes_on_in_the_next_jobs(jobs, digits_root, same):
    run = Run(disturbed(jobs, PAUSE="update:1"), digits_root, "launch.chain=3")
    first, second, third = run.ids
    for job, steps in ((first, 2), (second, 6)):
        run.begun(steps)
        jobs.run("scancel", "--signal=USR1", "--batch", job)
        jobs.wait(job)
        assert "the next job of the chain goes on" in jobs.said(job)
    jobs.wait(third)
    assert same(run)


def test_a_bad_node_is_left_out(jobs, digits_root, same):
    """nvidia-smi, which one of the nodes has a bad card for."""
    program = jobs.folder / "nvidia-smi"
    program.write_text(
        "#!/bin/bash\n[[ $1 == --query-gpu* ]] || exit 0\n"
        '[[ $SLURMD_NODENAME == n1 ]] && ecc=3 || ecc=0\necho "1000, 550, $ecc, Not Active, Not Active"\n'
    )
    program.chmod(0o755)
    with_card = type(jobs)({**jobs.environment, "PATH": f"{jobs.folder}:{jobs.environment['PATH']}"}, jobs.folder)
    run = Run(with_card, digits_root, "launch.exclude_bad_nodes=true", nodes=2)
    jobs.wait(run.job)
    assert "bad node n1: GPU 0 has 3 uncorrected ECC errors" in run.said()
    assert (run.folder / "slurm" / "bad_nodes").read_text().split() == ["n1"]
    again = (run.folder / "slurm" / "jobs").read_text().split()[-1]
    assert again != run.job
    jobs.wait(again)
    run.job = again
    assert run.nodes() == ["n2", "n3"]
    assert same(run)
    assert "bad nodes: n1" in jobs.m4train("launch", "status", run.folder).stdout


def test_a_job_that_asks_for_a_bad_node_alone_says_so(jobs, digits_root):
    program = jobs.folder / "nvidia-smi"
    program.write_text("#!/bin/bash\n[[ $1 == --query-gpu* ]] || exit 0\necho '1000, 550, 3, Not Active, Not Active'\n")
    program.chmod(0o755)
    with_card = type(jobs)({**jobs.environment, "PATH": f"{jobs.folder}:{jobs.environment['PATH']}"}, jobs.folder)
    run = Run(with_card, digits_root, "--nodelist=n2", "launch.exclude_bad_nodes=true")
    jobs.wait(run.job, until=("FAILED",))
    assert "bad node n2" in run.said()
    assert "cannot go on without n2" in run.said()
    assert not run.steps()


def test_a_cancelled_job_goes_on_with_the_same_command(jobs, digits_root, same):
    run = Run(disturbed(jobs, PAUSE="update:1"), digits_root)
    run.begun()
    jobs.run("scancel", run.job)
    jobs.wait(run.job, until=("CANCELLED",))
    made = len(run.steps())
    assert made < STEPS
    run = Run(jobs, digits_root)
    jobs.wait(run.job)
    assert same(run)


def test_a_job_that_is_cancelled_while_it_prepares_goes_on(jobs, digits_root, same, tmp_path):
    own = tmp_path / "own data"
    run = Run(jobs, digits_root, f'data.root="{own}"')
    run.until(lambda: own.exists() and any(own.iterdir()))
    jobs.run("scancel", run.job)
    jobs.wait(run.job, until=("CANCELLED",))
    run = Run(jobs, digits_root, f'data.root="{own}"')
    jobs.wait(run.job)
    run.losses()  # of other digits than those of the small tests


def test_two_jobs_do_not_train_one_run(jobs, digits_root, same):
    run = Run(disturbed(jobs, PAUSE="update:8"), digits_root, "--job-name=a b")
    refused = Run(jobs, digits_root, check=False)
    assert refused.answer.returncode == 2
    assert f"job {run.job} of this run" in refused.answer.stderr
    run.begun()
    forced = Run(jobs, digits_root, "--dependency=singleton")  # who says how they follow each other may
    jobs.wait(forced.job, until=("FAILED",))
    assert "is being trained by process" in forced.said()
    jobs.wait(run.job)
    assert same(run)


def test_names_with_spaces_and_relative_folders(jobs, digits_root, same):
    run = Run(jobs, digits_root, "--job-name=my own job", "run_dir='runs/my run'", "name=a b", name="runs/my run")
    jobs.wait(run.job)
    assert (jobs.folder / f"my own job-{run.job}.log").exists()
    assert same(run)
    assert "step 16" in jobs.m4train("launch", "status", "runs/my run").stdout
