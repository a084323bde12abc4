import torch

from m4train.training.guard import WINDOW, StepGuard


def _judge(guard, *norms):
    return [guard.judge(torch.tensor(norm)).item() for norm in norms]


def test_without_a_limit_only_what_is_not_finite_is_skipped():
    assert _judge(StepGuard(0.0, torch.device("cpu")), 1.0, 1e30, float("inf"), float("nan")) == [0, 0, 1, 1]


def test_outliers_are_judged_against_the_accepted_norms():
    guard = StepGuard(4.0, torch.device("cpu"))
    usual = [1.0 + 0.1 * (i % 3) for i in range(WINDOW)]
    assert _judge(guard, 50.0) == [0], "nothing is unusual before the window is full"
    guard = StepGuard(4.0, torch.device("cpu"))
    assert not any(_judge(guard, *usual))
    assert _judge(guard, 1.2, 1.8, float("nan"), 1.8, 1.3) == [0, 1, 1, 1, 0]
    count = guard.tensors()["guard/count"].item()
    assert count == WINDOW + 2
