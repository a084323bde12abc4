import pytest
import torch

from m4train.config import ScheduleConfig
from m4train.errors import ConfigError
from m4train.training.schedule import rate_factor


def _curve(name, steps=10, warmup=0, final=0.0):
    config = ScheduleConfig(name=name, warmup_steps=warmup, final_fraction=final)
    return [rate_factor(config, steps, step) for step in range(1, steps + 1)]


def test_warmup_rises_to_one():
    assert _curve("constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_ends_at_the_final_fraction():
    curve = _curve("linear", steps=10, warmup=2, final=0.2)
    assert curve[1] == 1.0
    assert curve[5] == pytest.approx(0.6)
    assert curve[-1] == pytest.approx(0.2)


def test_cosine_agrees_with_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1)
    expected = []
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert _curve("cosine", final=0.1) == pytest.approx(expected)


def test_unknown_shape_is_refused():
    with pytest.raises(ConfigError, match=r"schedule\.name"):
        rate_factor(ScheduleConfig(name="zigzag"), 10, 1)


def test_wsd_is_flat_and_then_decays():
    config = ScheduleConfig(name="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.1)
    curve = [rate_factor(config, 10, step) for step in range(1, 11)]
    assert curve[:6] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert curve[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert curve[-1] == pytest.approx(0.1)
