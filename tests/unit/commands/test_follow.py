"""Checkpoints of a run scored as they appear: skipped if done, appended, posted to the run's own W&B run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from m4train.cli import main
from m4train.commands import follow, slurm
from m4train.config.compose import load_run_config, save_config
from m4train.run_files import WANDB
from tests.helpers.checkpoints import saved_run
from tests.helpers.wandb_files import offline_files
from tests.unit.evaluation.benchmarks.test_run import rows_of

WATCH = ["poll=0.05", "device=cpu"]
SHORT = ("trainer.max_steps=6", "schedule.warmup_steps=0")


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path]:
    """A run of at most 6 steps with one checkpoint, and the data of a benchmark."""
    saved_run(tmp_path / "run", *SHORT)
    (tmp_path / "data" / "docvqa").mkdir(parents=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows_of("docvqa")), tmp_path / "data" / "docvqa" / "a.parquet")
    return tmp_path / "run", tmp_path / "data"


def scored(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_what_is_there_is_scored_once_and_appended(run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data = run
    posted: list[dict[str, Any]] = []
    monkeypatch.setattr(follow, "_posted", lambda config, run_dir, metrics: posted.append(metrics))
    asked = ["evaluate", f"run_dir={folder}", f"data={data}", "follow=false", *WATCH]
    assert main([*asked, "benchmarks={docvqa: 2}"]) == 0
    first = scored(folder)
    assert [(line["checkpoint"], line["step"], line["benchmark"], line["count"]) for line in first] == [
        ("step-000003", 3, "docvqa", 2)
    ]
    assert main([*asked, "benchmarks={docvqa: 2}"]) == 0
    assert scored(folder) == first  # skipped
    assert main([*asked, "benchmarks=[docvqa]"]) == 0  # all samples: another result
    assert [line["count"] for line in scored(folder)] == [2, 4]
    assert posted == [
        {"eval/benchmark/docvqa": line["value"], "eval/benchmarks": line["value"], "step": 3} for line in scored(folder)
    ]


@pytest.mark.slow
def test_a_checkpoint_is_scored_when_it_appears_until_the_last(run: tuple[Path, Path]) -> None:
    folder, data = run
    saved_run(folder, *SHORT, step=6)
    manifest = folder / "checkpoints" / "step-000006" / "manifest.json"
    manifest.rename(manifest.with_suffix(".aside"))  # not finished

    def finish() -> None:
        while not (folder / "evaluation.jsonl").exists():
            threading.Event().wait(0.02)
        manifest.with_suffix(".aside").rename(manifest)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    assert (
        main(
            [
                "evaluate",
                f"run_dir={folder}",
                f"data={data}",
                "follow=true",
                "idle=300",
                "benchmarks={docvqa: 1}",
                *WATCH,
            ]
        )
        == 0
    )
    thread.join()
    assert [line["checkpoint"] for line in scored(folder)] == ["step-000003", "step-000006"]


@pytest.mark.slow
def test_a_signal_ends_it_after_what_is_being_scored_and_it_goes_on(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = run
    saved_run(folder, *SHORT, step=5)
    score = follow.Watch.score
    monkeypatch.setattr(follow.Watch, "score", lambda *given: (os.kill(os.getpid(), signal.SIGUSR1), score(*given)))
    asked = ["evaluate", f"run_dir={folder}", f"data={data}", "follow=true", "idle=0", "benchmarks={docvqa: 1}", *WATCH]
    assert main(asked) == 3
    assert [line["step"] for line in scored(folder)] == [3]
    monkeypatch.setattr(follow.Watch, "score", score)
    assert main(asked) == 0  # quiet for longer than `idle`
    assert [line["step"] for line in scored(folder)] == [3, 5]


@pytest.mark.slow
def test_scores_go_to_the_wandb_run_of_the_run(run: tuple[Path, Path]) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder, data = run
    (folder / WANDB).write_text('{"id": "abc12345", "group": "run", "step": 5}')
    config = load_run_config([f"run_dir={folder}"])
    config.logging.trackers, config.logging.wandb.mode = ["wandb"], "offline"
    config.trainer.benchmarks, config.trainer.benchmark_data = {"docvqa": 1}, str(data)
    config.trainer.eval_every = 3
    save_config(config, folder / "config.yaml")
    assert main(["evaluate", f"run_dir={folder}", "follow=false", *WATCH]) == 0  # benchmarks and data are the run's own
    [found] = offline_files(folder)
    assert "-abc12345-benchmark/" in str(found)
    assert b"eval/benchmark/docvqa" in found.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["follow=yes"], "follow is yes, but must be true or false"),
        (["follow=true", "idle=long"], "idle is long, but must be a number of seconds"),
        (["follow=true", "benchmark=[docvqa]"], "takes run_dir, follow, benchmarks"),
        (["follow=true"], "was trained without trainer.benchmarks: name benchmarks="),
        (["follow=true", "benchmarks={docvqa: no}"], "benchmarks gives docvqa 'no' samples"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    run: tuple[Path, Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"run_dir={run[0]}", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_job_that_follows_is_submitted(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sbatch gets a script, which holds the command and its words."""
    folder, data = run
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\ncat "$1"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    words = [f"run_dir={folder}", "follow=true", "benchmarks=[docvqa]", f"data={data}"]
    assert main(["launch", "slurm", "evaluate", *words, "--time=1:00:00"]) == 0
    said = capsys.readouterr().out.splitlines()
    options = ["--job-name=m4train-evaluate", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=1:00:00"]
    assert [line for line in said if line.startswith("#SBATCH ")][-5:] == [f"#SBATCH {option}" for option in options]
    assert shlex.join(["set", "--", *words]) in said
    assert "export M4TRAIN_COMMAND=evaluate" in said
    assert 'exec m4train "${M4TRAIN_COMMAND:-train}" "$@"' in slurm._script().read_text()
    assert main(["launch", "slurm", "evaluate", f"run_dir={folder}", "follow=true"]) == 2  # no benchmarks: refused here
    assert main(["launch", "slurm", "evaluate", *words, "--nodes", "2"]) == 2
