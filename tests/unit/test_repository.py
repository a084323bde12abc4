"""The files of the repository that say the same thing twice say the same."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

from m4train.config.compose import groups, load_config

ROOT = Path(__file__).parents[2]


def test_pre_commit_runs_what_make_lint_runs():
    recipe = re.search(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == commands
    assert all(hook["pass_filenames"] is False and hook["language"] == "system" for hook in local["hooks"])


def test_the_licence_is_the_one_of_the_package():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert package["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_folders_that_a_run_writes_shadow_no_package(tmp_path):
    """From a checkout, the working folder comes first in the search for modules."""
    for choice in groups()["data"]:
        experiment = ["experiment=digits_sft", f"data={choice}", "trainer.eval_every=0", "data.sources.a.path=a.tar"]
        config = load_config(experiment)
        for folder in (config.data.root, config.run_dir):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    written = {folder.name for folder in tmp_path.iterdir()}
    assert "data" in written
    assert not written & ({*packages_distributions(), "datasets"} | sys.stdlib_module_names)
    find = "import importlib.util, sys; found = importlib.util.find_spec('datasets'); sys.exit(bool(found and not found.origin))"
    assert subprocess.run([sys.executable, "-c", find], cwd=tmp_path).returncode == 0


def test_what_the_demo_writes_is_ignored_by_git():
    ignored = (ROOT / ".gitignore").read_text().split()
    config = load_config(["experiment=digits_sft"])
    for folder in (config.data.root, config.run_dir):
        assert f"/{Path(folder).parts[0]}/" in ignored
