"""A project of one's own, what to do next, and completion."""

import shutil
import subprocess

import pytest

from m4train import cli
from m4train.commands.completion import SCRIPTS, words
from m4train.config.compose import load_config


def test_a_project_is_made_and_composes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    assert cli.main(["init", "mine", "--data", "train.json", "--epochs", "2"]) == 0
    assert "m4train validate experiment=mine" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "mine")
    config = load_config(["experiment=mine"])
    assert (config.trainer.epochs, config.schedule.warmup_fraction, config.adapter.kind) == (2.0, 0.03, "lora")
    assert config.data.sources["mine"].path == str(tmp_path / "train.json")
    assert config.model.pretrained == "HuggingFaceTB/SmolVLM-256M-Instruct"
    subprocess.run(["bash", "-n", "train.sh"], check=True)
    assert cli.main([]) == 0
    assert "m4train train experiment=mine" in capsys.readouterr().out
    assert cli.main(["init", "."]) == cli.main(["init"]) == cli.main(["init", "a", "--model", "none"]) == 2
    assert cli.main(["init", "a", "--epochs", "many"]) == 2


def test_without_arguments_it_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([]) == 0
    assert "m4train init DIR" in capsys.readouterr().out
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").write_text("name: one")
    assert cli.main([]) == 0
    assert "m4train report run_dir=runs/one" in capsys.readouterr().out


def test_the_end_of_a_line_is_completed():
    assert words("m4train tr") == ["train"]
    assert words("m4train data ") == ["convert", "index", "stats"]
    assert words("m4train train engine=fs") == ["engine=fsdp2", "engine=fsdp2_offload"]
    assert "trainer.max_steps=" in words("m4train train trainer.max")
    assert "experiment=" in words("m4train train exp")


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_of_a_shell_is_one(shell, tmp_path, capsys):
    assert cli.main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", str(script)], check=True)
    assert cli.main(["completion", "tcsh"]) == 2


def test_help_of_a_command_has_two_examples_and_its_keys_within_the_width(capsys):
    for name, command in cli.COMMANDS.items():
        assert len(command.examples) == 2
        assert cli.main([*name.split(), "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"m4train {example}" in shown for example in command.examples)
        lines = [line for line in shown.splitlines() if not line.startswith("  m4train ")]
        assert max(map(len, lines)) <= 80, (name, max(lines, key=len))
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "epochs" in shown
    assert "m4train config KEY" in shown
