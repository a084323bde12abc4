"""Attempts of a pipeline: what is refused, what goes on, and that the end is always the same."""

import json
import os

import pytest

from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.runner import run_pipeline
from data_pipelines.frame.store import read_documents
from m4train.cli import main
from m4train.errors import ConfigError
from tests.helpers.pipelines import digests

STEPS = "tests.helpers.pipelines"
YAML = f"""
defaults: [executor: local, _self_]
folder: ???
tasks: 4
stages:
  pages: {{steps: {{make: {{step: "{STEPS}:MakePages", pages: 20}}}}}}
  even: {{steps: {{odd: {{step: "{STEPS}:DropOdd"}}}}}}
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "numbers.yaml").write_text(YAML)

    def run(*overrides, folder="out"):
        config = load_pipeline(str(tmp_path / "numbers.yaml"), [f"folder={tmp_path / folder}", *overrides])
        return run_pipeline(config)

    return run


def _statistics(folder, stage):
    return json.loads((folder / stage / "statistics.json").read_text())


def test_a_pipeline_writes_documents_and_numbers(start, tmp_path):
    assert start() == 0
    kept = [document for rank in range(2) for document in read_documents(tmp_path / "out" / "even", rank, 2)]
    assert sorted(document.id for document in kept) == [f"{number:04d}" for number in range(0, 20, 2)]
    assert {document.metadata["source"]["date"] for document in kept} == {"2026"}
    (odd,) = _statistics(tmp_path / "out", "even")
    assert odd["before"] == {"documents": 20, "images": 20, "words": 80, "characters": 20 * 13 + 10}
    assert odd["after"]["documents"] == 10
    assert odd["counts"] == {"odd": 10}
    assert odd["histograms"]["number"] == {"edges": [5, 10], "counts": [5, 5, 10], "thresholds": [7]}
    assert len(odd["examples"]["odd"]) == 5
    assert odd["examples"]["odd"][0]["number_was"] % 2 == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rank_that_fails_leaves_the_others_alone_and_the_next_attempt_ends_the_same(start, tmp_path, workers, capsys):
    assert start(folder="whole") == 0
    more = [f"executor.workers={workers}", "odd.fail_at=5", f"odd.once={tmp_path / 'failed'}"]
    assert start(*more) == 1
    assert "rank 1: ValueError: page 5 cannot be read" in capsys.readouterr().err.replace("\n", " ")
    done = {path.name for path in (tmp_path / "out" / "even" / "ranks" / "completions").iterdir()}
    assert done == {"00000", "00002", "00003"}
    assert start(*more) == 0
    assert not list((tmp_path / "out" / "even" / "failures").iterdir())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert _statistics(tmp_path / "out", "even") == _statistics(tmp_path / "whole", "even")


def test_a_rank_that_is_killed_is_named_and_the_next_attempt_ends_the_same(start, tmp_path, capsys):
    assert start(folder="whole") == 0
    more = ["executor.workers=2", "odd.die_at=9", f"odd.once={tmp_path / 'killed'}"]
    assert start(*more) == 1
    assert "ended by signal 9" in capsys.readouterr().err.replace("\n", " ")
    assert start(*more) == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["tasks=6"], "other tasks (4 then, 6 now)"),
        (["make.files=[1,2]"], "other input files (0 files of 0 bytes then, 2 files of 3 bytes now)"),
        (["make.pages=22"], "other configuration (steps.make.pages 20 then, 22 now)"),
    ],
)
def test_another_attempt_with_something_else_is_refused_with_the_reason(start, tmp_path, change, said):
    assert start() == 0
    before = digests(tmp_path / "out")
    with pytest.raises(ConfigError) as error:
        start(*change)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert digests(tmp_path / "out") == before


def test_other_code_is_refused_unless_it_is_accepted(start, monkeypatch):
    assert start() == 0
    monkeypatch.setattr("data_pipelines.frame.manifest.code_version", lambda: "0.0.0+other")
    with pytest.raises(ConfigError, match=r"other code .* accept=\[code\]"):
        start()
    assert start("accept=[code]") == 0


def test_a_stage_made_again_from_something_else_is_refused_by_those_that_read_it(start, tmp_path):
    import shutil

    assert start() == 0
    shutil.rmtree(tmp_path / "out" / "pages")
    with pytest.raises(ConfigError, match="even was begun with other documents to read"):
        start("make.pages=30")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("make.page=3", "make.page is not a key of this pipeline, did you mean make.pages"),
        ("odd.fial_at=3", "did you mean odd.fail_at"),
        ("task=3", "did you mean tasks"),
        ("executor.worker=3", "did you mean executor.workers"),
        ("executor=slrum", "executor=slrum is not a choice, did you mean slurm"),
        ("executor=slurm", "executor=slurm needs executor.partition=NAME"),
        ("make.pages=many", "make.pages='many' is of the wrong type: it takes int"),
        ("stages.even.reads=other", "neither a stage before it that keeps documents (pages) nor a folder"),
        ("tasks=0", "tasks=0 is not a number of at least 1"),
        ("stages.even.steps.odd.once=3", "odd.once=3 is of the wrong type: it takes str"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_what_was_meant(start, tmp_path, override, said):
    with pytest.raises(ConfigError) as error:
        start(override)
    assert said in str(error.value)
    assert not (tmp_path / "out" / "pages").exists()


@pytest.mark.parametrize(
    ("queue", "refused"),
    [("RUNNING None", True), ("PENDING Dependency\nPENDING Resources", True), ("PENDING DependencyNeverSatisfied", False), ("", False)],
)  # fmt: skip
def test_a_second_call_while_jobs_of_the_first_are_in_the_queue_is_refused(
    start, tmp_path, monkeypatch, queue, refused
):
    """With programs that only say what SLURM's would; tests/slurm has the real ones."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, said in (("squeue", queue), ("sbatch", "Submitted batch job 8")):
        (programs / name).write_text(f"#!/bin/sh\necho {name} \"$@\" >> {tmp_path}/asked\nprintf '{said}'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    slurm = ["executor=slurm", "executor.partition=any", "executor.wait=false"]
    (tmp_path / "out" / "pages").mkdir(parents=True)
    (tmp_path / "out" / "pages" / "jobs.json").write_text('["7"]')
    if refused:
        with pytest.raises(
            ConfigError, match=r"SLURM jobs of this pipeline are not finished \(7\): wait for them, or scancel"
        ):
            start(*slurm)
        assert not (tmp_path / "out" / "pages" / "manifest.json").exists()  # nothing was begun
        assert "sbatch" not in (tmp_path / "asked").read_text()
        return
    assert start(*slurm) == 0
    assert json.loads((tmp_path / "out" / "pages" / "jobs.json").read_text()) == ["8"]
    assert (tmp_path / "asked").read_text().count("sbatch") == 2  # a job for each stage


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    (tmp_path / "numbers.yaml").write_text(YAML)
    assert main(["pipeline", str(tmp_path / "numbers.yaml")]) == 2
    assert "folder of the pipeline" in capsys.readouterr().err
    assert main(["pipeline", "no_such_thing"]) == 2
    assert "no_such_thing is not a pipeline" in capsys.readouterr().err
    assert main(["pipeline", "--help"]) == 0
