"""Schedule-free AdamW against the package used by hand, and what is saved, evaluated and skipped."""

from __future__ import annotations

import pytest
import torch

from m4train.config import OptimizerConfig
from m4train.config.compose import load_config
from m4train.errors import ConfigError
from m4train.training import optim
from m4train.training.schedule_free import to_gradients, to_weights
from tests.helpers.training import TinyModel, make_config, make_trainer

schedulefree = pytest.importorskip("schedulefree", reason="the extra schedule-free is not installed")


def quadratic(parameter: torch.Tensor) -> None:
    parameter.grad = 2 * (parameter.detach() - 3)


def test_the_weights_between_steps_are_those_of_the_package_in_evaluation():
    config = OptimizerConfig("schedule_free", lr=0.1)
    mine, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    group = {"params": [mine], "names": ["w"], "base_lr": 0.1, "weight_decay": 0.0}
    ours, package = optim.build_optimizer([group], config), schedulefree.AdamWScheduleFree([theirs], lr=0.1)
    for step in range(20):
        optim.set_rates(ours, min(1.0, (step + 1) / 5))
        for each in package.param_groups:
            each["lr"] = 0.1 * min(1.0, (step + 1) / 5)
        to_gradients(ours)
        quadratic(mine)
        if step == 7:  # skipped: everything is as it was
            before = ours.state[mine]["z"].clone()
            to_weights(ours)
            assert torch.equal(ours.state[mine]["z"], before)
            to_gradients(ours)
            quadratic(mine)
        package.train()
        quadratic(theirs)
        torch.testing.assert_close(mine, theirs)
        ours.step()
        to_weights(ours)
        package.step()
        package.eval()
        torch.testing.assert_close(mine, theirs)
    assert (mine - 3).abs().max() < (torch.tensor([1.0, -2.0]) - 3).abs().max()


def test_gradients_are_taken_elsewhere_and_evaluation_is_not(tmp_path):
    config = make_config(tmp_path, max_steps=4)
    config.optimizer.name, config.schedule.name = "schedule_free", "constant"
    trainer = make_trainer(config, TinyModel())
    trainer.train()
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.model.eval()
    trainer.engine.depart()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters()))
    trainer.model.train()
    trainer.engine.depart()
    assert not all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters()))
    to_weights(trainer.engine.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters()))


def test_a_decay_of_the_rate_is_refused_and_so_are_shards():
    own = ["experiment=digits_pretrain", "optimizer=schedule_free"]
    with pytest.raises(ConfigError, match=r"replaces the decay of the rate: choose schedule=constant"):
        load_config([*own, "schedule=cosine"])
    assert load_config([*own, "schedule=constant"]).optimizer.name == "schedule_free"
    with pytest.raises(ConfigError, match="schedule_free"):
        load_config([*own, "schedule=constant", "engine=fsdp2", "launch.processes=2"])
