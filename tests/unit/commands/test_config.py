"""`m4train config`: what a run would use, and what a key means."""

import pytest
import yaml

from m4train.cli import main
from m4train.config.compose import load_config, save_config


def test_the_composed_configuration_is_yaml_that_composes_to_itself(capsys, tmp_path):
    assert main(["config", "experiment=digits_sft", "trainer.max_steps=70"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 70
    assert printed["run_dir"] == "runs/digits_sft"
    assert printed["data"]["sources"]["single"]["path"] == "data/digits/single/train-*.tar"
    save_config(load_config(["experiment=digits_sft", "trainer.max_steps=70"]), tmp_path / "config.yaml")
    assert printed == yaml.safe_load((tmp_path / "config.yaml").read_text())


def test_the_configuration_of_a_run(capsys, tmp_path):
    save_config(load_config(["experiment=digits_sft", "seed=3", f"run_dir={tmp_path}"]), tmp_path / "config.yaml")
    assert main(["config", f"run_dir={tmp_path}"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.micro_batch_size"], ["type:     int", "default:  8", "m4train/training/trainer.py"]),
        (["engine"], ["engine=fsdp2_offload", "engine.offload (bool, false)", "m4train/launching.py"]),
        (["freeze"], ["freeze=connector_only  The two backbones stay as they are"]),
        (["warmup_steps", "experiment=digits_sft"], ["schedule.warmup_steps", "schedule.warmup_steps: 20"]),
        (["data.sources.multi.weight", "experiment=digits_sft"], ["data.sources.multi.weight: 3.0"]),
        (["trainer.batch_ramp", "experiment=digits_sft"], ["trainer.batch_ramp:\n    start: null"]),
    ],
)
def test_a_key_is_explained(capsys, arguments, said):
    assert main(["config", *arguments]) == 0
    printed = capsys.readouterr().out
    assert [words for words in said if words not in printed] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.mx_steps"], "did you mean trainer.max_steps?"),
        (["warmup_step"], "did you mean schedule.warmup_steps?"),
        (["experiment=digits_sft", "trainer.mx_steps=3"], "did you mean trainer.max_steps?"),
        ([], "data is not chosen"),
        (["--all", "experiment=digits_sft"], "'--all' is no"),
    ],
)
def test_what_is_no_key_is_refused(capsys, arguments, said):
    assert main(["config", *arguments]) == 2
    assert said in capsys.readouterr().err
