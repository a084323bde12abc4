"""Lengths as people say them, values that are watched, and optimizers of one's own."""

import json

import pytest
import torch

from m4train.config.compose import load_config, load_run_config, save_config
from m4train.data.plan.lengths import batch_line, passes, settled, steps_of
from m4train.data.plan.plan import Plan
from m4train.errors import ConfigError, TrainingError
from m4train.optimizers import OPTIMIZERS
from m4train.training import optim
from tests.helpers.data import make_sources
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics

SFT = "experiment=digits_sft"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Two sources, 30 documents and 12 conversations, mixed two to one."""
    sources, data = make_sources(tmp_path_factory.mktemp("data"), 30, 12)
    return Plan(sources, data, 0, 2)


def seen_through(plan, epochs):
    """By another way: for each source the last step that holds one of the units of its first passes."""
    last = {}
    for step in plan.steps():
        if step.step > 400:
            break
        for pack in step.packs:
            for unit in pack.units:
                if unit.epoch < epochs:
                    last[plan.sources[unit.source].name] = step.step
    return last


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_epochs_are_counted_exactly_by_the_source_that_ends_first_or_last(plan, epochs):
    last = seen_through(plan, epochs)
    assert steps_of(plan, epochs, "first") == min(last.values())
    assert steps_of(plan, epochs, "last") == max(last.values())


def test_a_part_of_an_epoch_is_a_part_of_the_steps(plan):
    assert 1 <= steps_of(plan, 0.5, "last") < steps_of(plan, 1, "last") < steps_of(plan, 1.5, "last")
    for step in plan.steps():
        if step.step == steps_of(plan, 2, "last"):
            found = passes(plan, step.state, "last")
            assert found["epoch"] == min(value for name, value in found.items() if name != "epoch") >= 2
            break


def test_shares_and_epochs_become_steps(plan):
    lengths = ["max_steps=200", "save_every=0.25", "eval_every=epoch", "log_every=7"]
    config = load_config([SFT, *(f"trainer.{length}" for length in lengths), "schedule.warmup_fraction=0.1"])
    trainer = settled(config, lambda: plan).trainer
    assert (trainer.save_every, trainer.eval_every, trainer.log_every) == (50, steps_of(plan, 1, "first"), 7)
    assert settled(config, lambda: plan).schedule.warmup_steps == 20
    config.trainer.epochs, config.trainer.epochs_until = 2.0, "last"
    found = settled(config, lambda: plan)
    steps = steps_of(plan, 2, "last")
    assert (found.trainer.max_steps, found.schedule.warmup_steps) == (steps, round(0.1 * steps))
    assert config.trainer.max_steps == 200
    next(iter(config.data.sources.values())).stream = True
    with pytest.raises(ConfigError, match=r"stream is true: say trainer\.max_steps"):
        settled(config, lambda: plan)


def test_the_nearest_length_counts(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [/experiment/digits_sft]\ntrainer: {epochs: 3}\nschedule: {warmup_fraction: 0.1}\n", encoding="utf-8"
    )
    own = [f"experiment={file}"]
    config = load_config(own)
    assert (config.trainer.epochs, config.schedule.warmup_fraction) == (3.0, 0.1)
    config = load_config([*own, "trainer.max_steps=40", "schedule.warmup_steps=4"])
    assert (config.trainer.epochs, config.schedule.warmup_fraction) == (None, None)
    with pytest.raises(ConfigError, match="say the same in two ways"):
        load_config([*own, "trainer.max_steps=40", "trainer.epochs=2"])
    save_config(load_config(own), tmp_path / "config.yaml")
    run = f"run_dir={tmp_path}"
    assert load_run_config([run]).trainer.epochs == 3.0
    assert load_run_config([run, "trainer.max_steps=40"]).trainer.epochs is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.save_every=often", "a share of the run between 0 and 1, or epoch"),
        ("trainer.save_every=1.5", "save_every is 1.5"),
        ("trainer.log_every=0", "log_every is 0"),
        ("trainer.eval_every=true", "eval_every is True"),
        ("trainer.epochs=0", "epochs is 0.0"),
        ("trainer.epochs_until=both", "first, last"),
        ("schedule.warmup_fraction=2", "a share of the run from 0 to 1"),
        ("trainer.best.mode=more", "min, max"),
        ("trainer.early_stopping.patience=-1", "patience is -1"),
        ("optimizer.arguments={a: 1}", "package.module:Class"),
        ("optimizer.name=adam", "adamw, adamw_8bit"),
    ],
)
def test_what_is_no_length_is_refused(override, said):
    with pytest.raises(ConfigError, match=said):
        load_config([SFT, override])


def test_watching_what_is_not_measured_is_refused(tmp_path):
    for watched in ("trainer.early_stopping.patience=2", "trainer.best.metric=eval/loss", "trainer.eval_first=true"):
        with pytest.raises(ConfigError, match=r"set trainer\.eval_every"):
            load_config([SFT, "trainer.eval_every=0", watched])
    config = make_config(tmp_path, max_steps=3, log_every=1)
    config.trainer.best.metric = "los"
    with pytest.raises(TrainingError, match=r"trainer\.best\.metric is los, which this run does not log; it logs"):
        make_trainer(config).train()


def test_the_best_checkpoint_is_kept_beyond_keep_last(tmp_path):
    config = make_config(tmp_path, max_steps=6, log_every=1, save_every=1, keep_last=1)
    config.trainer.best.metric, config.trainer.best.mode = "step", "min"  # the first one is the best
    make_trainer(config).train()
    folders = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert folders == ["step-000001", "step-000006"]
    assert json.loads((tmp_path / "checkpoints/best.json").read_text()) == {"step": 1, "metric": "step", "value": 1}
    config.trainer.best.mode, config.run_dir = "max", str(tmp_path / "max")
    make_trainer(config).train()
    assert [path.name for path in (tmp_path / "max/checkpoints").glob("step-*")] == ["step-000006"]


def test_a_run_that_gets_no_better_ends_and_stays_ended(tmp_path):
    config = make_config(tmp_path, max_steps=50, log_every=1)
    stopping = config.trainer.early_stopping
    stopping.metric, stopping.patience = "step", 3  # which only grows
    result = make_trainer(config).train()
    assert (result.stopped_by, result.step) == ("early_stopping", 4)
    again = make_trainer(config).train()
    assert (again.stopped_by, again.step) == ("early_stopping", 4)
    stopping.min_change, stopping.mode, config.run_dir = 1.5, "max", str(tmp_path / "change")
    assert make_trainer(config).train().step == 50  # 1, 3, 5 ... are better by more than 1.5


def test_the_held_out_loss_is_measured_before_the_first_step(tmp_path):
    config = make_config(tmp_path, max_steps=2, eval_every=2, eval_first=True)
    make_trainer(config).train()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2]


def test_tokens_are_counted_over_all_starts(tmp_path):
    for stop in (3, 4):
        config = make_config(tmp_path, max_steps=7, log_every=1, stop_after=stop)
        make_trainer(config).train()
    rows = read_metrics(tmp_path)
    total = 0
    for row in rows:
        total += row["tokens"]
        assert row["tokens_seen"] == total
    assert len(rows) == 7


def test_the_batch_is_said_in_packs():
    config = make_config("runs/x", global_batch_size=12, micro_batch_size=2)
    line = batch_line(config, 2, 31.5)
    assert line == "batch: 12 packs a step = 2 ranks x 2 micro x 3 accumulation; about 31.5 samples"
    assert "= 3 ranks x 2 micro x 2 accumulation" in batch_line(config, 3, None)
    assert batch_line(config, 5, None).endswith("x 2 accumulation (less 8)")


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS), "torch.optim:RAdam", "torch.optim:Adagrad"])
def test_every_optimizer_learns_and_resumes(name, tmp_path):
    if name == "paged_adamw_8bit" and not torch.cuda.is_available():
        pytest.skip("paged memory is CUDA's own")
    if name == "schedule_free":
        pytest.importorskip("schedulefree", reason="the extra schedule-free is not installed")
    for run, pieces in (("whole", (24,)), ("broken", (9, 15))):
        for steps in pieces:
            config = make_config(tmp_path / run, max_steps=24, stop_after=steps, save_every=100)
            config.optimizer.name = name
            torch.manual_seed(0)
            make_trainer(config).train()
    whole, broken = (read_metrics(tmp_path / run) for run in ("whole", "broken"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in broken]
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_arguments_of_a_class_act_and_wrong_ones_are_named():
    config = make_config("runs/x").optimizer
    config.name, config.arguments = "torch.optim:SGD", {"momentum": 0.5}
    model = TinyModel()
    parameters = dict(model.named_parameters())
    groups = optim.parameter_groups(parameters, set(), model.parts(), config)
    assert optim.make_optimizer(groups, config).param_groups[0]["momentum"] == 0.5
    for name, arguments in (
        ("torch.optim:SGD", {"inertia": 1}),
        ("torch.optim:Nothing", {}),
        ("no_such_package:SGD", {}),
    ):
        config.name, config.arguments = name, arguments
        with pytest.raises(ConfigError, match=rf"optimizer\.name is {name}, which cannot be made"):
            optim.make_optimizer(groups, config)
