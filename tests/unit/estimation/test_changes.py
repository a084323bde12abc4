"""What the advice of `m4train estimate` says is what it estimated: given back, it composes to the very same configuration."""

import dataclasses

import pytest

from m4train.config.compose import load_config
from m4train.estimation import changes
from m4train.estimation.changes import CHANGES, applied, changes_that_fit
from m4train.estimation.ranks import RankMemory
from m4train.estimation.subject import Subject
from tests.unit.estimation.test_needs import _subject

RECIPES = ["sft/idefics3_full", "sft/smolvlm_2b_full", "sft/idefics2_lora", "idefics2/sft", "smolvlm/256m_stage2"]


def _composed(recipe, *overrides):
    return load_config([f"experiment={recipe}", "trainer.precision=bf16", *overrides], sources=False)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_overrides_of_changes_do_what_was_estimated(recipe, ranks):
    config = _composed(recipe)
    chosen = [(act,) for act in CHANGES if ranks == 8] + [CHANGES]
    found = [applied(config, ranks, acts) for acts in chosen]
    assert any(len(overrides) > 1 for _, overrides in found)
    for changed, overrides in found:
        if overrides:
            assert dataclasses.asdict(_composed(recipe, *overrides)) == dataclasses.asdict(changed), overrides


@pytest.mark.parametrize("needed", [2, 3, 5, 9])
def test_no_more_changes_are_advised_than_it_takes(needed, monkeypatch):
    """Of changes that each save the same, the first of those that together fit."""
    acts = [lambda config, ranks, n=n: (f"data.cost.frame={n}",) for n in range(9)]
    tried = []

    def memory(subject):
        raise AssertionError

    def changed(subject, capacity, chosen):
        tried.append(len(chosen))
        found = RankMemory({"parameters": 10.0 - len(chosen)}, 0.0, True)
        return changes.Change(tuple(str(n) for n in range(len(chosen))), found, len(chosen) >= needed)

    monkeypatch.setattr(Subject, "memory", memory)
    monkeypatch.setattr(changes, "CHANGES", tuple(acts))
    monkeypatch.setattr(changes, "_changed", changed)
    (best,) = changes_that_fit(_subject(), 1.0)
    assert len(best.overrides) == needed
    assert len(tried) <= 9 + 5


def test_the_stages_of_a_run_that_is_not_trained_yet_are_known(tmp_path, monkeypatch, capsys):
    from m4train.commands.architectures import architecture_of

    monkeypatch.chdir(tmp_path)
    stages = "stages=[{name: one, overrides: ['model.add_tokens=[\"<a>\"]']}, {name: two}, {name: three}]"
    given = ["experiment=sft/smolvlm_256m_full", "name=mine", stages]
    alone = architecture_of(load_config(["experiment=sft/smolvlm_256m_full"], sources=False))[0]
    third, stored = architecture_of(load_config([*given, "stage=three"], sources=False))
    assert (third.token_rows, stored) == (alone.token_rows + 1, None)
    said = capsys.readouterr()
    assert "runs/mine/two is not there yet: estimated as stage two makes it" in said.err
    assert not said.out  # which may be read as JSON
