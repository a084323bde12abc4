"""What a rank was at when it died, and the samples that ranks died with twice."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from m4train import exits
from m4train.cli import main
from m4train.deaths import Note, died, note_of
from m4train.training.engines import make_engine
from tests.end_to_end.conftest import small_run
from tests.helpers.distributed import end_ranks, start_ranks
from tests.helpers.training import TinyModel, make_config, make_trainer


@dataclass(frozen=True)
class Document:
    source: str
    key: str
    shard: str = "shards/0.tar"


def documents(*keys):
    return tuple(Document("pages", key) for key in keys)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder for a launch, and one of a run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "launch").mkdir()
    monkeypatch.setenv(exits.FOLDER, str(tmp_path / "launch"))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    return tmp_path / "run"


def test_the_sample_of_two_deaths_is_named_wherever_it_was_read_the_second_time(run):
    folder = run.parent / "launch"
    for rank, keys in ((3, ("a", "b", "c")), (0, ("x", "b"))):
        note = note_of(run, rank)
        note.write("forward", 6, documents(*["a", "long", "list", "of", "samples", "before"]))
        note.write("forward", 7, documents(*keys))
        said = died(folder, rank)
        assert said.startswith("it was on n7, in forward of step 7")
        if rank == 3:
            assert "died before" not in said
    assert "a rank died before with this sample: pages:b in shards/0.tar" in said
    assert f"`m4train replay --step 7 run_dir={run}`" in said
    assert "m4train pipeline takedown 'shards=shards/0.tar' 'keys=[b]'" in said
    assert [len(json.loads(line)["samples"]) for line in (run / "deaths.jsonl").read_text().splitlines()] == [3, 2]


def test_outside_of_a_micro_batch_nothing_is_suspected(run):
    folder, note = run.parent / "launch", note_of(run, 1)
    for _ in range(2):
        note.write("forward", 7, documents("a"))
        note.write("backward", 7, documents("a"))
        note.write("fetch", 8)
        assert died(folder, 1) == "it was on n7, in fetch of step 8"


def test_a_device_may_still_be_busy_with_what_came_before(run):
    folder, note = run.parent / "launch", note_of(run, 1)
    for number in range(6):
        note.write("forward", number, documents(f"k{number}"), ahead=True)
    note.write("update", 5)
    died(folder, 1)
    (death,) = map(json.loads, (run / "deaths.jsonl").read_text().splitlines())
    assert [key for _, key, _ in death["samples"]] == ["k5", "k4", "k3"]


def test_many_samples_are_counted(run):
    note = note_of(run, 0)
    note.write("forward", 1, documents(*(f"k{number}" for number in range(20))))
    died(run.parent / "launch", 0)
    assert "k7 in shards/0.tar and 12 more, listed in deaths.jsonl" in died(run.parent / "launch", 0)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"samples": []}\n', '\xff"'])
def test_without_a_whole_note_nothing_is_said(text, run):
    if text is not None:
        (run.parent / "launch" / "at-0.json").write_text(text)
    assert died(run.parent / "launch", 0) == ""


def test_nobody_reads_a_note_where_no_launcher_asks(run, monkeypatch):
    monkeypatch.setenv(exits.FOLDER, str(run / "gone"))
    assert note_of(run, 0) is None
    monkeypatch.delenv(exits.FOLDER)
    assert note_of(run, 0) is None


def test_a_job_asks_by_a_command(run, capsys):
    folder = run.parent / "launch"
    assert main(["launch", "died", str(folder), "2"]) == 0
    assert capsys.readouterr().out == "it had not begun\n"
    Note(folder, run, 2).write("save", 4)
    assert main(["launch", "died", str(folder), "2"]) == 0
    assert capsys.readouterr().out == "it was on n7, in save of step 4\n"


def _die(run_dir):
    config = make_config(run_dir, max_steps=50)
    config.engine.name = "ddp"
    engine, model = make_engine(config), TinyModel()
    trainer = make_trainer(config, model, engine)
    if engine.rank == 1:
        model.layers[1].register_forward_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if trainer.step == 3 else None
        )
    trainer.train()


@pytest.mark.slow
def test_a_rank_that_is_killed_in_a_micro_batch_leaves_its_samples(run, tmp_path):
    ranks = start_ranks(_die, 2, str(run), folder=tmp_path)
    try:
        assert [child.wait(timeout=120) for child in ranks][1] == -signal.SIGKILL
    finally:
        end_ranks(ranks)
    said = [died(run.parent / "launch", 1) for _ in range(2)]
    assert said[0] == "it was on n7, in forward of step 4"
    assert said[1].startswith(f"{said[0]}, and a rank died before with th")


# The first rank of a real launch that comes to a sample of step 3 dies with it: `sitecustomize` is read by every Python.
DEADLY = """
import os, signal
from m4train import deaths
usual = deaths.Note.write
def write(self, stage, step, documents=(), ahead=False):
    usual(self, stage, step, documents, ahead)
    if step == 3 and documents and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
deaths.Note.write = write
"""


@pytest.mark.full
def test_the_script_for_torchrun_names_the_sample(digits_root, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(tmp_path), str(root)])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": paths, "PROCESSES": "2"}
    command = ["bash", root / "launch" / "torchrun.sh", *small_run(digits_root, tmp_path), "engine=ddp"]
    for named in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("rank 1 died: it was on ")
        assert ("a rank died before with" in last) is named


@pytest.mark.full
def test_the_last_line_of_launch_processes_names_the_sample(digits_root, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    command = [sys.executable, "-m", "m4train", "train", *small_run(digits_root, tmp_path), "engine=ddp"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    last = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "launch.processes=2"], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 1, done.stderr
        last.append(done.stderr.strip().splitlines()[-1])
    assert "process 1 was ended by SIGKILL and the others were stopped; it was on " in last[0]
    assert "died before" not in last[0]
    (first, second) = map(json.loads, (tmp_path / "run" / "deaths.jsonl").read_text().splitlines())
    assert first["samples"] == second["samples"]
    assert all(f":{key} in " in last[1] for _, key, _ in second["samples"][:8]), last[1]
    assert "the same command continues the run" in last[1] or "starts the run again" in last[1]
