"""Where a run goes on: from the checkpoint it is told to begin from, or back to, once; then from its own."""

import json
import shutil

import pytest

from m4train.errors import CheckpointError, ConfigError
from m4train.run_files import STARTS
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.checkpoints.state import open_checkpoint
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def _config(run_dir, resume="auto", **trainer):
    config = make_config(run_dir, **{"save_every": 2, "keep_last": 2, **trainer})
    config.resume = str(resume)
    return config


def _train(config):
    return make_trainer(config, TinyModel()).train()


def _steps(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").iterdir())


def _losses(run_dir):
    return [(line["step"], line["loss"], line["data_hash"]) for line in read_metrics(run_dir)]


def _lineage(run_dir, step):
    state = open_checkpoint(run_dir / "checkpoints" / f"step-{step:06d}").state
    return [start["step"] for start in state["lineage"]]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of 12 steps that kept steps 4, 8, 10 and 12."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    _train(_config(run_dir, keep_every=4))
    return run_dir


@pytest.fixture
def run(first, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(first, tmp_path / "run")


def test_another_run_begins_from_a_named_checkpoint_and_goes_on_from_its_own(first, tmp_path):
    """The same command again and again, as a requeued job gives it, ends."""
    start, other = first / "checkpoints" / "step-000004", tmp_path / "other"
    for last in (7, 10, 12):
        assert _train(_config(other, start, stop_after=3)).step == last
    assert _losses(other) == _losses(first)[4:]
    assert _lineage(other, 12) == [4]
    assert find_checkpoint(_config(other, start)).step == 12
    assert not (other / "set-aside").exists()


def test_the_named_checkpoint_may_be_gone_or_moved_once_the_run_has_one_of_its_own(first, tmp_path):
    start, moved, other = tmp_path / "here" / "step-000004", tmp_path / "there", tmp_path / "other"
    shutil.copytree(first / "checkpoints" / "step-000004", start)
    _train(_config(other, start, stop_after=3))
    start.rename(moved)
    for named in (moved, start):
        assert find_checkpoint(_config(other, named)).step == 7


def test_a_run_that_came_from_elsewhere_is_not_overwritten(first, tmp_path):
    other = tmp_path / "other"
    _train(_config(other, first / "checkpoints" / "step-000004", stop_after=3))
    with pytest.raises(ConfigError, match=r"holds step-000007, which did not come from .*step-000008: choose another"):
        find_checkpoint(_config(other, first / "checkpoints" / "step-000008"))


@pytest.mark.parametrize("lr", [0.01, 0.02])
def test_going_back_sets_aside_what_came_after(lr, run, first):
    """What was abandoned is kept under a name that says so, never wins again, and pruning leaves the new ones alone."""
    back = run / "checkpoints" / "step-000004"
    config = _config(run, back, stop_after=2, keep_last=1)
    config.optimizer.lr = lr
    assert _train(config).step == 6
    assert _steps(run) == [6]
    aside = run / "set-aside" / "after-step-000004"
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == [f"step-{n:06d}" for n in (8, 10, 12)]
    kept, gone = read_metrics(run), [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in gone] == list(range(5, 13))
    assert (_losses(run) == _losses(first)[:6]) == (lr == 0.01)
    assert _lineage(run, 6) == [4]
    config.trainer.stop_after = None
    assert find_checkpoint(config).step == 6  # the same command goes on
    config.resume = "auto"
    assert find_checkpoint(config).step == 6
    assert _train(config).step == 12
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 13))
    assert [path.name for path in (run / "set-aside").iterdir()] == ["after-step-000004"]


def test_going_back_twice(run):
    for step, lineage in ((8, [8]), (4, [4])):
        named = run / "checkpoints" / f"step-{step:06d}"
        _train(_config(run, named, stop_after=1, keep_every=4))
        assert _lineage(run, step + 1) == lineage
    assert sorted(path.name for path in (run / "set-aside").iterdir()) == ["after-step-000004", "after-step-000008"]
    _train(_config(run, run / "checkpoints" / "step-000005", stop_after=1, keep_last=3))
    assert _lineage(run, 6) == [4, 5]
    _train(_config(run, run / "checkpoints" / "step-000004", stop_after=1))
    assert _lineage(run, 5) == [4]
    assert (run / "set-aside" / "after-step-000004-2").is_dir()


def test_a_kill_while_things_are_set_aside_leaves_a_whole_run(run, monkeypatch):
    from m4train.training.checkpoints import aside

    def killed(source, target):
        if source.name == "step-000008":
            raise KeyboardInterrupt
        source.rename(target)

    monkeypatch.setattr(aside, "os", type("os", (), {"rename": staticmethod(killed)}))
    with pytest.raises(KeyboardInterrupt):
        _train(_config(run, run / "checkpoints" / "step-000004"))
    monkeypatch.undo()
    assert find_checkpoint(_config(run)).step == 8
    assert _train(_config(run, run / "checkpoints" / "step-000004", stop_after=1)).step == 5
    assert _steps(run) == [4, 5]


def test_a_damaged_checkpoint_that_was_passed_over_never_makes_pruning_delete_the_new_ones(run):
    (run / "checkpoints" / "step-000012" / "manifest.json").unlink()
    (run / "checkpoints" / "step-000010" / "state.json").unlink()
    assert _train(_config(run, stop_after=1, keep_last=1)).step == 9
    assert _steps(run) == [9]
    assert _train(_config(run, keep_last=1)).step == 12


def test_every_configuration_of_a_run_is_noted_with_the_step_it_held_from(tmp_path):
    _train(_config(tmp_path, stop_after=4))
    for lr, last in ((0.01, 6), (0.02, 8), (0.02, 10)):
        config = _config(tmp_path, stop_after=2)
        config.optimizer.lr, config.trainer.max_steps = lr, 12
        config.trainer.stop_after = 2
        assert _train(config).step == last
    lines = [json.loads(line) for line in (tmp_path / STARTS).read_text().splitlines()]
    assert [(line["step"], line["config"]["optimizer"]["lr"]) for line in lines] == [(0, 0.01), (4, 0.01), (6, 0.02)]


def test_the_last_checkpoint_of_all_that_is_damaged_is_named(tmp_path):
    _train(_config(tmp_path, keep_last=1))
    (tmp_path / "checkpoints" / "step-000012" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"Every checkpoint in .* lacks its file state\.json"):
        find_checkpoint(_config(tmp_path))
