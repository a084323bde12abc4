"""The recipes for one's own data fit the machines that docs/recipes.md and their headers name them for."""

import re
from pathlib import Path

import pytest

from m4train.commands.estimate import estimated
from m4train.config.compose import load_config

ROOT = Path(__file__).parents[3]
MACHINES = {"four nodes": ("h100", 32), "node of": ("h100", 8), "24 GB GPU": ("rtx4090", 1), "80 GB GPU": ("h100", 1)}
ROWS = re.findall(
    r"^\| (.*(?:GPU|node).*?) \| `(m4train .*?)` \| (.*) \|$", (ROOT / "docs/recipes.md").read_text(), re.M
)
CLAIMS = [
    (machine, command, recipe, float(expected))
    for machine, command, listed in ROWS
    for recipe, expected in re.findall(r"`(\w+)` ([\d.]+)", listed)
]


def machine_of(text):
    return next(found for part, found in MACHINES.items() if part in text)


def test_each_recipe_is_listed_for_the_machine_of_its_header():
    assert {machine_of(machine) for machine, _, _ in ROWS} == set(MACHINES.values())
    listed = {(recipe, machine_of(machine)) for machine, _, recipe, _ in CLAIMS}
    recipes = sorted((ROOT / "conf/experiment/sft").glob("*.yaml"))
    assert len(recipes) == 15
    for path in recipes:
        header = path.read_text().splitlines()[1]
        assert (path.stem, machine_of(header)) in listed


@pytest.mark.full
@pytest.mark.parametrize(("machine", "command", "recipe", "expected"), CLAIMS)
def test_a_recipe_fits_its_machine(machine, command, recipe, expected, monkeypatch):
    gpu, ranks = machine_of(machine)
    monkeypatch.setattr("m4train.estimation.needs.changes_that_fit", lambda *_: [])
    given = [word for word in command.split() if re.match(r"(engine|trainer)[.\w]*=", word)]
    config = load_config([f"experiment=sft/{recipe}", "data.sources.mine.path=mine.json", *given])
    found = estimated(config, gpu, ranks, None)
    assert found.fits
    assert found.memory.expected / 2**30 == pytest.approx(expected, rel=0.05)
