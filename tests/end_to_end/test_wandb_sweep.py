"""The sweep file of launch/, as `wandb sweep` and `wandb agent` read it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from m4train.cli import main
from m4train.config.compose import load_config, resource_folder
from tests.helpers.wandb_server import KEY, serving
from tests.helpers.warm import ROOT

FILE = resource_folder("launch") / "wandb_sweep.yaml"
POINT = {"optimizer.lr": 0.003, "schedule.warmup_steps": 1}


def test_the_arguments_that_an_agent_makes_are_a_configuration(monkeypatch):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    held = yaml.safe_load(FILE.read_text())
    assert set(held["parameters"]) == set(POINT)
    command = utils.create_sweep_command(held["command"])
    made = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in POINT.items()}})
    words = [word for part in command for word in (made[part[2:-1]] if part == "${args}" else [part])]
    assert words[:2] == ["m4train", "train"]
    assert "--optimizer.lr=0.003" in words
    seen = []
    train = lambda stages, **options: seen.extend(stages.configs) or 0
    monkeypatch.setattr("m4train.commands.arguments.Command.load", lambda self, place=None: train)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(words[1:]) == 0
    assert (seen[0].optimizer.lr, seen[0].schedule.warmup_steps) == (0.003, 1)
    assert seen[0].run_dir == "runs/sweep/abc123"
    assert seen[0].logging.wandb.mode == "online"


def test_only_overrides_lose_their_dashes(capsys):
    assert main(["train", "experiment=digits_pretrain", "--optimizer.rate=0.1"]) == 2
    assert "optimizer.rate is not a configuration key" in capsys.readouterr().err
    assert main(["train", "experiment=digits_pretrain", "--fast"]) == 2
    assert "'--fast' is not an option of this command" in capsys.readouterr().err
    assert load_config(["experiment=digits_pretrain"]).name


@pytest.mark.full
def test_a_sweep_trains_a_run_for_each_point(digits_root: Path, tmp_path: Path) -> None:
    """`wandb sweep` and `wandb agent` against a server on loopback; of the file only the size of the runs is changed."""
    held = yaml.safe_load(FILE.read_text())
    small = [
        f"data.root={digits_root}",
        "trainer.max_steps=2",
        "trainer.eval_every=2",
        "evaluation.shown=0",
        "threads=1",
    ]
    small += ["trainer.global_batch_size=1", "trainer.micro_batch_size=1", "data.num_workers=0"]
    held["command"] = [*held["command"][:-1], *small, held["command"][-1]]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(held))
    with serving() as server:
        server.points = [POINT, {**POINT, "optimizer.lr": 0.001}]
        places = {f"WANDB_{name}_DIR": str(tmp_path / name.lower()) for name in ("DATA", "CACHE", "CONFIG")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, **places, "PATH": path, "PYTHONPATH": str(ROOT)}
        env |= {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY, "WANDB_AGENT_REPORT_INTERVAL": "1"}
        for command in (["sweep", "sweep.yaml"], ["agent", "someone/m4train/sweep0"]):
            done = subprocess.run(
                [sys.executable, "-m", "wandb", *command],
                cwd=tmp_path,
                env=env,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        runs = [server.runs[name] for name in ("sweep0run0", "sweep0run1")]
        assert [run.exit_code for run in runs] == [0, 0]
        assert [[line["_step"] for line in run.history][-1] for run in runs] == [2, 2]
        assert [run.config["optimizer"]["lr"] for run in runs] == [0.003, 0.001]
        assert (tmp_path / "runs" / "sweep" / "sweep0run1" / "metrics.jsonl").is_file()
