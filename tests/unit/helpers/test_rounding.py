"""The bounds on rounding: what computes the same passes under every kernel, and what does not is caught."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.rounding import apart, assert_near, own_error, widened


def test_apart_is_relative_to_the_largest_value_of_the_whole_result() -> None:
    assert apart(torch.tensor([1.0, 4.0]), torch.tensor([1.5, 4.0])) == 0.125
    assert apart([torch.tensor([0.0]), 2.0], [torch.tensor([1.0]), 2.0]) == 0.5
    assert apart({"a": torch.zeros(2)}, {"a": torch.zeros(2)}) == 0.0
    assert apart(torch.tensor([torch.nan]), torch.tensor([1.0])) == torch.inf


def test_what_has_another_shape_or_number_is_not_compared() -> None:
    with pytest.raises(AssertionError, match=r"\(2,\) is compared with \(1, 2\)"):
        apart(torch.zeros(2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="longer"):
        apart([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)])


def test_widened_leaves_the_original_and_what_counts() -> None:
    layer = nn.Linear(2, 2)
    wide, values = widened(layer), widened({"x": torch.ones(1), "ids": torch.ones(1, dtype=torch.int64), "flag": True})
    assert layer.weight.dtype == torch.float32
    assert wide.weight.dtype == values["x"].dtype == torch.float64
    assert values["ids"].dtype == torch.int64
    assert values["flag"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_order_of_addition_passes_and_an_error_does_not(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    error = own_error(torch.matmul, a, b)
    assert 0 < error < 20 * torch.finfo(dtype).eps
    order = torch.randperm(64, generator=generator)
    assert_near(a[:, order] @ b[order], a @ b, error)
    wrong = a.clone()
    wrong[3, 5] += 40 * float(torch.finfo(dtype).eps * a.abs().max())
    with pytest.raises(AssertionError, match="the reference's own error is"):
        assert_near(wrong @ b, a @ b, error)


def test_no_error_by_chance_allows_the_distance_of_neighbouring_numbers() -> None:
    one = torch.ones(1)
    assert_near(one.nextafter(2 * one), one, 0.0)
    with pytest.raises(AssertionError, match=r"and the reference's own error is 4\.77e-07"):
        assert_near(1.000003 * one, one, 0.0)
