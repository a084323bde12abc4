"""Four nodes with addresses of their own: the numbers of one process under sharding engines, stages, what is slow or cannot be
reached, and following a run from wherever its ranks are."""

import json
import signal
import sys
import time

import pytest

from tests.end_to_end.conftest import small_run
from tests.helpers import warm
from tests.slurm.conftest import on_node
from tests.slurm.runs import STEPS, Run, disturbed

pytestmark = pytest.mark.full
KEPT = ("step", "loss_tokens", "data_hash")  # what is the same on any number of processes, to the last digit


@pytest.fixture(scope="module")
def one(digits_root, tmp_path_factory):
    """What one process trains with packs enough for four."""
    folder = tmp_path_factory.mktemp("one")
    options = [*small_run(digits_root, folder), f"trainer.max_steps={STEPS}", *FOUR, "engine=single"]
    run = warm.start_command("train", *options, folder=folder)
    assert run.wait(timeout=300) == 0, run.said()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


FOUR = ["trainer.global_batch_size=4"]


def same(rows, expected):
    assert [[row[key] for key in KEPT] for row in rows] == [[row[key] for key in KEPT] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-4)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_four_nodes_equal_one_process_and_an_interrupt_changes_nothing(engine, jobs, digits_root, one):
    run = Run(
        disturbed(jobs, PAUSE="update:1"), digits_root, *FOUR, f"engine={engine}", "trainer.save_every=100", nodes=4
    )
    run.begun()
    assert "told to wind up" in jobs.m4train("launch", "interrupt", run.folder).stdout
    jobs.wait(run.job)
    assert jobs.state(run.job) == ("COMPLETED", 1)
    assert "4 ranks meet at" in run.said()
    assert "6 pairs of nodes" in (jobs.folder / "m4train-logs" / run.job / "nodes.log").read_text()
    assert len(run.rows()) == STEPS
    same(run.rows(), one)


MEET = """
import os, socket, sys, torch
from datetime import timedelta
import torch.distributed as dist
os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE="2", MASTER_ADDR=sys.argv[1], MASTER_PORT=sys.argv[2])
dist.init_process_group("gloo", timeout=timedelta(seconds=10))
total = torch.ones(3)
dist.all_reduce(total)
print("sum", int(total.sum()))
"""


def test_ranks_that_would_meet_at_localhost_do_not_meet(cluster, spaces, jobs):
    for address, meets in (("", True), ("127.0.0.1", False)):
        asked = f'srun {sys.executable} -c "$0" {address or "$(hostname)"} 12345'
        (jobs.folder / "meet.sh").write_text(
            f'#!/bin/bash\nset -- "$MEET"\nexport MEET\n{asked.replace("$0", "$MEET")}\n'
        )
        environment = {**jobs.environment, "MEET": MEET}
        sizes = ["--nodes=2", "--ntasks-per-node=1", "--output=met.log", "--parsable"]
        job = type(jobs)(environment, jobs.folder).run("sbatch", *sizes, "meet.sh").stdout.strip()
        jobs.wait(job, until=("COMPLETED",) if meets else ("FAILED",))
        said = (jobs.folder / "met.log").read_text()
        assert said.count("sum 6") == (2 if meets else 0), said
        (jobs.folder / "met.log").unlink()


def test_a_node_with_a_slow_network_is_named_and_left_out(cluster, spaces, jobs, digits_root):
    slow = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64kbit", "latency", "400ms"]
    try:
        on_node(cluster, "n2", *slow)
    except Exception as error:
        pytest.skip(f"this kernel slows no network down: {error}")
    try:
        run = Run(jobs, digits_root, "launch.exclude_bad_nodes=true", nodes=3)
        jobs.wait(run.job)
        assert "bad node n2: slow to n1 0.0" in run.said()
        run.job = (run.folder / "slurm" / "jobs").read_text().split()[-1]
        jobs.wait(run.job)
        assert run.nodes() == ["n1", "n3", "n4"]
        assert len(run.rows()) == STEPS
    finally:
        on_node(cluster, "n2", "tc", "qdisc", "del", "dev", "eth0", "root")


def test_a_run_is_followed_and_stopped_from_elsewhere(jobs, digits_root):
    run = Run(disturbed(jobs, PAUSE="update:2"), digits_root, "launch.attempts=1", nodes=3)
    run.begun()
    status = jobs.m4train("launch", "status", run.folder).stdout
    assert f"job {run.job}: RUNNING" in status
    assert "n[1-3]" in status
    run.ranks(2)[0].send_signal(signal.SIGSEGV)
    jobs.wait(run.job, until=("FAILED",))
    shown = jobs.m4train("launch", "logs", run.folder).stdout
    assert next(line.rpartition("/")[2] for line in shown.splitlines() if line.startswith("== ")) == "rank-2.log"
    assert f"rank 2: Segmentation fault; it was on {run.nodes()[2]}, in " in run.said()
    again = Run(disturbed(jobs, PAUSE="update:2"), digits_root, nodes=3)
    again.begun(len(run.steps()) + 2)
    assert f"told to stop: {again.job}" in jobs.m4train("launch", "stop", again.folder).stdout
    jobs.wait(again.job, until=("FAILED",))  # code 3: a checkpoint, and more to do
    assert "the ranks ended with code 3" in again.said() or "the ranks ended with code 0" in again.said()
    made = len(again.steps())
    assert made < STEPS
    assert f"newest checkpoint: step-{made:06d}" in jobs.m4train("launch", "status", again.folder).stdout


def test_a_requeue_in_the_second_stage_goes_on_there(jobs, digits_root):
    small = [
        word for word in small_run(digits_root, jobs.folder) if "experiment=" not in word and "max_steps" not in word
    ]
    small += ["trainer.save_every=1", "engine=ddp", "trainer.max_steps=6"]
    command = ["launch", "slurm", "--nodes=2", "--cpus-per-task=1", "launch.processes=1", "experiment=digits"]
    answer = disturbed(jobs, PAUSE="update:1").m4train(*command, *small).stdout
    job = answer.split()[-1]
    metrics = {name: jobs.folder / "run" / name / "metrics.jsonl" for name in ("pretrain", "sft")}
    deadline = time.monotonic() + 900
    while not (metrics["sft"].exists() and len(metrics["sft"].read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline, jobs.said(job)
        time.sleep(0.1)
    before = metrics["pretrain"].read_text()
    jobs.run("scontrol", "requeue", job)
    jobs.wait(job)
    assert jobs.state(job) == ("COMPLETED", 1)
    assert metrics["pretrain"].read_text() == before
    assert [json.loads(line)["step"] for line in metrics["sft"].read_text().splitlines()] == list(range(1, 7))
    assert "pretrain is trained already" in jobs.said(job)
    assert {path.name for path in (jobs.folder / "run" / "slurm").glob("*config.yaml")} == {
        "pretrain-config.yaml",
        "sft-config.yaml",
    }
    assert "run/sft: step 6" in jobs.m4train("launch", "status", "run").stdout
