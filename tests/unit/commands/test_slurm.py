"""What `m4train launch slurm` hands to sbatch, and what a job of an array makes of it."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from m4train.cli import main
from m4train.config.compose import load_config

FIRST = ["experiment=digits_pretrain", "logging=none"]


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """The arguments that an sbatch of this test got."""
    programs, said = tmp_path / "bin", tmp_path / "said"
    program(programs / "sbatch", f'printf "%s\\n" "$@" > {said}; echo Submitted batch job 7')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return lambda: said.read_text().splitlines()


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_run_is_submitted_as_it_was_written(submitted, capsys):
    own = ["--nodes", "2", "--partition=big", "launch.processes=4", "engine=ddp", *FIRST]
    assert main(["launch", "slurm", *own]) == 0
    assert capsys.readouterr().out == "Submitted batch job 7\n"
    (job,) = submitted()
    lines = Path(job).read_text().splitlines()
    options = ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=big"]
    assert [line for line in lines if line.startswith("#SBATCH ")][-4:] == [f"#SBATCH {option}" for option in options]
    assert shlex.join(["set", "--", "launch.processes=4", "engine=ddp", *FIRST]) in lines


@pytest.mark.parametrize("at_a_time", [[], ["--parallel", "2"]])
def test_a_sweep_is_an_array_of_which_each_job_trains_one_point(at_a_time, submitted, tmp_path):
    swept = [*FIRST, "optimizer.lr=1e-3,3e-3", "name='a b','c'", "launch.processes=1"]
    assert main(["launch", "slurm", "-m", *at_a_time, *swept]) == 0
    (script,) = submitted()
    text = Path(script).read_text().splitlines()
    options = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", f"--array=0-3{'%2' if at_a_time else ''}"]
    assert [line for line in text if line.startswith("#SBATCH ")][-4:] == [f"#SBATCH {option}" for option in options]
    (given,) = (shlex.split(line) for line in text if line.startswith("set -- "))
    assert given[2] == "--points"
    file = given[3]
    lines = [shlex.split(line) for line in Path(file).read_text().splitlines()]
    configs = [load_config(line) for line in lines]
    assert [(config.optimizer.lr, config.name) for config in configs] == [
        (1e-3, "a b"),
        (1e-3, "c"),
        (3e-3, "a b"),
        (3e-3, "c"),
    ]
    assert len({config.run_dir for config in configs}) == 4

    # a job of the array, with programs in the place of those of SLURM
    programs = tmp_path / "bin"
    program(programs / "srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"')
    program(programs / "m4train", 'printf "%s\\n" "$@"')
    environment = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}
    ran = subprocess.run(
        ["bash", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    given = ran.stdout.splitlines()
    start = given.index("train")
    assert given[start + 1 : start + 1 + len(lines[2])] == lines[2]


def test_the_same_sweep_again_names_the_same_runs(submitted):
    files = []
    for _ in range(2):
        assert main(["launch", "slurm", "-m", *FIRST, "seed=1,2", "launch.processes=1"]) == 0
        files.append((Path(submitted()[-1]).parents[1] / "sweep.points").read_text())
    assert files[0] == files[1]


def test_what_no_array_can_do_is_refused_before_anything_is_queued(submitted, tmp_path, capsys):
    assert main(["launch", "slurm", "-m", *FIRST, "hydra/sweeper=optuna", "seed=1,2"]) == 2
    assert "an array has all its runs from the start" in capsys.readouterr().err
    assert main(["launch", "slurm", "-m", *FIRST, "optimizer.lr=1e-3,-1", "launch.processes=1"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert main(["launch", "slurm", "-m", *FIRST, "seed=1,2", "launch.processes=1", "launch.chain=3"]) == 2
    assert "launch.chain is 3, but the jobs of a sweep are an array" in capsys.readouterr().err
    assert not (tmp_path / "said").exists()
