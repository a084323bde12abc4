"""Options of commands, as they are written by hand, by habit, and by agents."""

import pytest

from m4train import cli
from m4train.commands import inspect as inspect_run
from m4train.config.compose import load_config


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """What `m4train plan` is called with, in the place of planning."""
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(inspect_run, "plan", lambda config, **values: calls.append((config, values)) or 0)
    return calls


FIRST = "experiment=digits_pretrain"


@pytest.mark.parametrize(
    "given",
    [
        ["--ranks", "8", "--json", FIRST, "seed=3"],
        ["--ranks=8", FIRST, "--json", "seed=3"],
        [FIRST, "seed=3", "--json", "--ranks", "8"],
        [FIRST, "ranks=8", "seed=3", "--json"],
        [f"--{FIRST}", "--seed=3", "--ranks=8", "--json"],
        ["--ranks", "2", "--json", "--ranks", "8", "--", FIRST, "seed=3"],
    ],
)
def test_options_stand_before_between_and_after_overrides(given, planned, capsys):
    assert cli.main(["plan", *given]) == 0
    (config, values), *others = planned
    assert not others
    assert values == {"ranks": 8, "as_json": True, "page": None}
    assert config == load_config([FIRST, "seed=3"])
    said = capsys.readouterr().err
    assert said == ("m4train: ranks=8 still works, but write --ranks 8.\n" if "ranks=8" in given else "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["plan", "--rank", "8"], "'--rank' is not an option of this command, did you mean --ranks"),
        (["plan", "--ranks"], "Option '--ranks' requires an argument"),
        (["plan", "--ranks", "none"], "Invalid value for '--ranks'"),
        (["plan", "ranks=0"], "0 is not in the range x>=1"),
        (["plan", "-x", FIRST], "'-x' is not an option"),
        (["plan", "--trainer.max_step=3", FIRST], "did you mean trainer.max_steps"),
        (["replay", FIRST], "Missing option '--step'"),
        (["generate"], "Missing argument 'MODEL'"),
        (["compare"], "Missing argument 'RUN RUN ...'"),
        (["data"], "data needs one of index, stats, convert"),
        (["pln"], "did you mean plan"),
    ],
)
def test_wrong_arguments_are_answered_before_anything_is_read(given, said, planned, capsys):
    assert cli.main(given) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1 + ("ranks=0" in given)
    assert not planned


def test_a_group_of_commands_lists_them(capsys):
    assert cli.main(["data", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [word in shown for word in ("data index", "data stats", "data convert", "preview")] == [1, 1, 1, 0]
