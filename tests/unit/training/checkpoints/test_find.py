"""What may differ between a checkpoint and the run that continues it."""

import shutil

import pytest

from m4train.errors import CheckpointError
from m4train.training.checkpoints.changes import starts_fresh_optimizer
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.schedule import rate_factor
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def _train(config):
    return make_trainer(config, TinyModel()).train()


def test_keys_that_compute_nothing_may_change(tmp_path):
    _train(make_config(tmp_path, max_steps=4))
    config = make_config(tmp_path, max_steps=4, gradient_checkpointing=True, compile=True, deterministic=True)
    config.trainer.max_skipped_in_a_row = 99
    config.data.index_dir, config.data.cache_dir, config.data.cache_size = "indexes", "cache", 3.0
    config.data.cost.frame, config.data.max_bad_fraction, config.model.loss = 7.0, 0.5, "torch"
    assert find_checkpoint(config).step == 4


def test_a_finished_run_is_extended_with_a_fresh_optimizer_again_and_again(tmp_path):
    _train(make_config(tmp_path, max_steps=4))
    for steps in (6, 8):
        longer = make_config(tmp_path, max_steps=steps)
        longer.resume_optimizer = "fresh"
        assert starts_fresh_optimizer(find_checkpoint(longer).state, longer)
        assert _train(longer).step == steps
        assert not starts_fresh_optimizer(
            find_checkpoint(longer).state, longer
        )  # the same command goes on with its own
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))


RATE = "; learning rate of step 5: "
CONTINUED = [  # keys that change, parts of what is said, and what the last step is then
    ({"trainer.max_steps": 6}, ("trainer.max_steps 12 -> 6", RATE), 6),
    ({"trainer.max_steps": 14}, ("trainer.max_steps 12 -> 14", RATE), 14),
    ({"optimizer.lr": 2e-2}, ("optimizer.lr 0.01 -> 0.02", f"{RATE}0.00883 -> 0.0177"), 12),
    ({"optimizer.betas": [0.8, 0.9]}, ("optimizer.betas [0.9, 0.999] -> [0.8, 0.9]",), 12),
    ({"schedule.name": "constant"}, ("schedule.name cosine -> constant", RATE), 12),
    ({"trainer.micro_batch_size": 2}, ("trainer.micro_batch_size 8 -> 2",), 12),
    ({"trainer.global_batch_size": 4}, ("trainer.global_batch_size 8 -> 4",), 12),
    ({"trainer.precision": "bf16"}, ("trainer.precision fp32 -> bf16",), 12),
    (
        {"trainer.save_every": 3, "trainer.eval_every": 6},
        ("trainer.save_every 4 -> 3", "trainer.eval_every 0 -> 6"),
        12,
    ),
    ({"data.mixture.by": "tokens"}, ("data.mixture.by samples -> tokens",), 12),
    ({"trainer.stop_after": 2}, (), 6),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    _train(make_config(run_dir, stop_after=4))
    return run_dir


def _changed(run_dir, changes):
    config = make_config(run_dir)
    for key, value in changes.items():
        *path, name = key.split(".")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, name, value)
    return config


@pytest.mark.parametrize(("changes", "said", "last"), CONTINUED, ids=[str(list(row[0])) for row in CONTINUED])
def test_what_has_a_clear_meaning_may_change_and_is_said(changes, said, last, begun, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(begun, run_dir)
    trainer = make_trainer(_changed(run_dir, changes), TinyModel())
    assert trainer.continued.startswith("continuing from step 4; changed: ")
    assert all(part in trainer.continued for part in said)
    assert trainer.train().step == last
    for line in read_metrics(run_dir)[4:]:
        assert line["lr"] == pytest.approx(
            trainer.config.optimizer.lr
            * rate_factor(trainer.config.schedule, trainer.config.trainer.max_steps, line["step"])
        )


def test_extending_a_run_keeps_its_moments_and_follows_the_longer_schedule(begun, tmp_path):
    """At a constant rate there is nothing in a run's length: extended and whole runs are the same."""
    curves = []
    for name, steps in (("pieces", (4, 9)), ("whole", (9,))):
        for last in steps:
            config = make_config(tmp_path / name, max_steps=last)
            config.schedule.name = "constant"
            _train(config)
        curves.append([(line["step"], line["loss"], line["lr"]) for line in read_metrics(tmp_path / name)])
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"seed": 1}, "put them back, or choose another run_dir"),
        ({"data.sequence_length": 64}, "put them back, or choose another run_dir"),
        ({"model.family": "idefics2"}, "put them back, or choose another run_dir"),
        (
            {"optimizer.name": "muon"},
            "resume_optimizer=fresh, which keeps the weights and loses the optimizer's moments",
        ),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_change_is_refused_with_the_way_out(changes, way, begun):
    with pytest.raises(CheckpointError, match=way) as caught:
        find_checkpoint(_changed(begun, changes))
    assert all(key in str(caught.value) for key in changes)
    assert "\n" not in str(caught.value)
