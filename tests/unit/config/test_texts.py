"""Names and paths stay text, and mean the same to every command."""

from pathlib import Path

import pytest

from m4train.config.compose import load_config, load_known_config, load_run_config, save_config
from m4train.config.texts import as_text, text_of
from m4train.errors import ConfigError

DIGITS = "experiment=digits_pretrain"
ODD = ["2025_01_15", "true", "0007", "runs/lr=0.1", "runs/lr=0.1,seed=2", "a b", "a:b", "C\\x"]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_is_the_same_quoted_and_not_and_to_every_command(name, tmp_path, monkeypatch):
    """Each name in each form; which form goes to which command is dealt in turn."""
    monkeypatch.chdir(tmp_path)
    forms = [f"run_dir={name}", f'run_dir="{name}"', f"run_dir='{name}'"]
    assert {text_of(as_text(form)) for form in forms} == {name}
    first, second, third = forms[ODD.index(name) % 3 :] + forms[: ODD.index(name) % 3]
    config = load_config([DIGITS, first, f"name={name}", f"data.sources.documents.path={name}"])
    assert (config.name, config.run_dir, config.data.sources["documents"].path) == (name, name, name)
    Path(name).mkdir(parents=True)
    save_config(config, Path(name) / "config.yaml")
    assert load_run_config([second, "seed=7"]).run_dir == name
    assert load_known_config([third]).name == name


def test_other_keys_and_what_is_meant_as_syntax_are_left_alone():
    for override in (
        "seed=7",
        "optimizer.lr=1e-3",
        "model.tokenizer=null",
        "data=own",
        "run_dir=${name}",
        "a.b",
        "name='x'",
    ):
        assert text_of(as_text(override)) == text_of(override)
    with pytest.raises(ConfigError, match="put quotes around the whole path"):
        load_config([DIGITS, "data.sources.documents.path=a-{000..002}.tar"])


def test_an_empty_run_dir_is_refused():
    for override in ("run_dir=", "run_dir=''", "run_dir=' '"):
        with pytest.raises(ConfigError, match="run_dir is empty"):
            load_config([DIGITS, override])


def test_a_command_about_a_run_takes_its_configuration_by_run_dir_alone(tmp_path):
    run = f"run_dir={tmp_path}"
    with pytest.raises(ConfigError, match="data"):
        load_known_config([run])
    save_config(load_config([DIGITS, run, "seed=7"]), tmp_path / "config.yaml")
    assert load_known_config([run]).seed == 7
    assert load_known_config([run, "seed=8"]).seed == 8
    assert load_known_config([run, DIGITS]).seed == 0
