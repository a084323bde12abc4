"""Sweeps with Hydra's syntax: which runs they start, where, with what; and runs next to each other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from m4train import cli
from m4train.commands import sweep
from m4train.commands.sweep import point_name
from m4train.config.compose import load_config, save_config

DIGITS = "experiment=digits_pretrain"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The commands that a sweep starts, in the place of runs, each of which logs a loss."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(command, env):
        commands.append(command[4:])
        config = load_config([word for word in command[4:] if "=" in word])
        folder = tmp_path / config.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": config.optimizer.lr * 2}) + "\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


# The kinds of sweeps that Hydra documents -> the values of the points
SWEEPS = {
    "optimizer.lr=0.1,0.2": ["optimizer.lr=0.1", "optimizer.lr=0.2"],
    "optimizer.lr=choice(0.1,0.2)": ["optimizer.lr=0.1", "optimizer.lr=0.2"],
    "seed=range(1,4)": ["seed=1", "seed=2", "seed=3"],
    "seed=range(1,6,2)": ["seed=1", "seed=3", "seed=5"],
    "seed=sort(3,1,2)": ["seed=1", "seed=2", "seed=3"],
    "schedule=glob(c*)": ["schedule=constant", "schedule=cosine"],
    "schedule=glob(*,exclude=[c*,w*])": ["schedule=linear"],
    "optimizer.betas=[0.9,0.95],[0.9,0.99]": ["optimizer.betas=[0.9,0.95]", "optimizer.betas=[0.9,0.99]"],
    "name='a','b'": ["name='a'", "name='b'"],
    # hydra.cc/docs/advanced/override_grammar/extended
    "seed=sort(3,1,2,reverse=true)": ["seed=3", "seed=2", "seed=1"],
    "seed=sort(range(3,0,-1))": ["seed=1", "seed=2", "seed=3"],
    "seed=range(3)": ["seed=0", "seed=1", "seed=2"],
    "trainer.max_grad_norm=range(0.5,2,0.5)": [f"trainer.max_grad_norm={value}" for value in (0.5, 1.0, 1.5)],
    "seed=tag(low,choice(1,2))": ["seed=1", "seed=2"],
    "optimizer.lr=float(choice(1,2))": ["optimizer.lr=1.0", "optimizer.lr=2.0"],
    "name=choice('a b',c)": ["name=a\\ b", "name=c"],
    "schedule=glob([co*,l*])": ["schedule=constant", "schedule=cosine", "schedule=linear"],
    "adapter.targets.text=[q_proj],[q_proj,v_proj]": [
        "adapter.targets.text=[q_proj]",
        "adapter.targets.text=[q_proj,v_proj]",
    ],
    "adapter=lora,none": ["adapter=lora", "adapter=none"],
}


@pytest.mark.parametrize("given", SWEEPS)
def test_every_point_of_a_sweep_is_a_run_of_its_own(given, started):
    assert cli.main(["train", "-m", DIGITS, given, "trainer.max_steps=60"]) == 0
    assert [[word for word in command if word.partition("=")[0] == given.partition("=")[0]] for command in started] == [
        [value] for value in SWEEPS[given]
    ]
    folders = [command[-1] for command in started]
    assert len(set(folders)) == len(folders)
    assert all(DIGITS in command and "trainer.max_steps=60" in command for command in started)


def test_a_key_that_is_given_again_means_its_last_value(started):
    assert cli.main(["train", "-m", DIGITS, "seed=7", "name=a", "seed=1,2", "name=b"]) == 0
    found = [[word for word in command if word.startswith(("seed=", "name="))] for command in started]
    assert [sorted(words) for words in found] == [["name=b", "seed=1"], ["name=b", "seed=2"]]


def test_shuffled_points_are_all_there(started):
    assert cli.main(["train", "-m", DIGITS, "seed=shuffle(range(1,9))"]) == 0
    seeds = [word for command in started for word in command if word.startswith("seed=")]
    assert sorted(seeds) == [f"seed={number}" for number in range(1, 9)]


def test_an_experiment_says_what_is_swept(started, tmp_path):
    file = tmp_path / "swept.yaml"
    file.write_text(
        "defaults:\n  - /experiment/digits_pretrain\nhydra:\n  sweeper:\n    params:\n      optimizer.lr: 1e-3,2e-3\n"
    )
    assert cli.main(["train", "-m", f"experiment={file}"]) == 0
    assert [load_config([word for word in command if "=" in word]).optimizer.lr for command in started] == [1e-3, 2e-3]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Lines of what Python was started with by processes of launchers, in which a script stands in for it."""
    script, said, start = tmp_path / "python", tmp_path / "said", tmp_path / "site" / "sitecustomize.py"
    script.write_text(
        f"""#!/bin/sh
echo "$*" >> {said}
for word in "$@"; do case $word in run_dir=*) folder=$(echo "$word" | tr -d '"' | cut -c9-);; esac; done
mkdir -p "$folder" && echo '{{"step": 1, "loss": 0.5}}' > "$folder/metrics.jsonl"
"""
    )
    script.chmod(0o755)
    start.parent.mkdir()
    start.write_text(f"import sys\nsys.executable = {str(script)!r}\n")
    paths = [str(start.parent), str(Path(cli.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.chdir(tmp_path)
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "launcher"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
    ],
)
def test_launchers_of_hydra_start_every_point(module, launcher, stand_in, tmp_path):
    pytest.importorskip(f"hydra_plugins.{module}", reason=f"needs {module}, of the extra sweeps")
    assert cli.main(["train", "-m", DIGITS, *launcher, "optimizer.lr=1e-3,3e-3"]) == 0
    lines = sorted(stand_in.read_text().splitlines())
    assert len(lines) == 2
    for line, value in zip(lines, ("0.001", "0.003"), strict=True):
        assert line.startswith(f"-m m4train train {DIGITS} optimizer.lr={value} ")
        assert line.endswith(f'run_dir="runs/digits_pretrain/optimizer.lr={value}"')
    assert len(list((tmp_path / "runs/digits_pretrain").glob("*/metrics.jsonl"))) == 2


def test_a_sweep_over_two_keys_is_every_pair_and_names_keep_what_was_written(started):
    assert cli.main(["train", "--multirun", DIGITS, "name=007,1e10", "seed=1,2"]) == 0
    assert len(started) == 4
    configs = [load_config([word for word in command if "=" in word]) for command in started]
    assert [(config.name, config.seed) for config in configs] == [("007", 1), ("007", 2), ("1e10", 1), ("1e10", 2)]


def test_the_same_sweep_again_is_the_same_runs(started):
    for _ in range(2):
        assert cli.main(["train", "-m", DIGITS, "optimizer.lr=1e-3,1e-4"]) == 0
    assert started[:2] == started[2:]
    assert started[0][-1] == 'run_dir="runs/digits_pretrain/optimizer.lr=0.001"'


def test_a_run_that_fails_fails_the_sweep(started, monkeypatch, capsys):
    monkeypatch.setattr(sweep.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert cli.main(["train", "-m", DIGITS, "seed=1,2"]) == 1
    assert "ended with exit code 1" in capsys.readouterr().err
    assert cli.main(["plan", "-m", DIGITS, "seed=1,2"]) == 2


def test_optuna_looks_for_a_small_loss(started, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    assert cli.main(["train", "-m", DIGITS, *sweeper, "optimizer.lr=interval(0.001,0.1)"]) == 0
    assert len(started) == 3
    assert len({command[-1] for command in started}) == 3


def test_names_of_points_are_names_of_folders():
    assert point_name(["b=2", "a=x/y z"]) == "a=x_y_z,b=2"
    assert len(point_name([f"key{n}={n}" for n in range(99)])) < 140


def test_runs_are_compared_by_a_metric(started, capsys, monkeypatch):
    cli.main(["train", "-m", DIGITS, "optimizer.lr=0.2,0.1,0.3"])
    capsys.readouterr()
    assert cli.main(["compare", "runs/digits_pretrain", "--json", "--out", "page.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["best"] for run in found["runs"]] == [0.2, 0.4, 0.6]
    assert [run["differs"] for run in found["runs"]] == [{"optimizer.lr": lr} for lr in (0.1, 0.2, 0.3)]
    page = Path("page.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["compare", "runs/digits_pretrain", "--mode", "max"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.index("0.3") < shown.index("0.1")
    assert cli.main(["compare", "runs/digits_pretrain", "--metric", "los"]) == 2
    assert "they log loss, step" in capsys.readouterr().err
    assert cli.main(["compare"]) == 2


def test_the_version_is_printed():
    done = subprocess.run([sys.executable, "-m", "m4train", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("m4train 0.")


@pytest.mark.parametrize("words", [["train", "-m"], ["launch", "slurm", "--dry-run", "-m"]])
def test_a_sweep_of_a_run_of_stages_is_refused_as_that(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "experiment=digits", "seed=1,2"]) == 2
    assert "a sweep trains one run at each point, not stages" in capsys.readouterr().err
