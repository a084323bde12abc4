"""What packs cost is found from times that are not exact, and not from times that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m4train.pack_costs import PackCosts, fit_costs

TRUE = PackCosts(0.02, 3e-4, 5e-8, 0.011)


def shapes(count: int, seed: int = 0) -> np.ndarray:
    """(packs, tokens, squared, frames) of micro-batches of one to three packs."""
    rng = np.random.default_rng(seed)
    packs = rng.integers(1, 4, count)
    tokens = packs * rng.integers(2_000, 4_097, count)
    return np.stack([packs, tokens, tokens * rng.integers(100, 4_000, count), packs * rng.integers(0, 30, count)], 1)


@given(st.tuples(*[st.just(0.0) | st.floats(0.1, 1.0)] * 4).filter(lambda costs: costs[1] > 0))
def test_exact_times_give_the_costs_back(relative: tuple[float, ...]) -> None:
    true = PackCosts(*(share * each for share, each in zip(relative, TRUE)))
    given = shapes(12)
    costs, spread = fit_costs(given, given @ np.array(true))
    assert np.allclose(costs, true, rtol=1e-6, atol=1e-12)
    assert spread < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_times_with_noise_give_them_nearly(seed: int) -> None:
    given = shapes(40, seed)
    noise = 1 + 0.01 * np.random.default_rng(seed).standard_normal(40)
    costs, spread = fit_costs(given, given @ np.array(TRUE) * noise)
    assert 0.003 < spread < 0.02
    assert np.allclose(costs[1:], TRUE[1:], rtol=0.12)
    more = shapes(100, 9)
    assert np.allclose(more @ np.array(costs), more @ np.array(TRUE), rtol=0.02)


def test_a_cost_that_would_be_negative_is_none() -> None:
    given = shapes(20)
    costs, _ = fit_costs(given, given[:, 1] * 1e-4 - given[:, 3] * 1e-5)
    assert min(costs) == 0.0
    assert costs.frame == 0.0


GIVEN = shapes(12)
EXACT = GIVEN @ np.array(TRUE)


@pytest.mark.parametrize(
    ("shapes", "seconds", "why"),
    [
        (GIVEN[:5], EXACT[:5], "fewer than 6 micro-batches"),
        (GIVEN[:1].repeat(12, 0), EXACT, "fewer than 6 micro-batches"),
        (GIVEN, EXACT * np.where(np.arange(12) == 3, np.nan, 1.0), "not a positive number"),
        (GIVEN, EXACT - 10.0, "not a positive number"),
        (GIVEN, np.random.default_rng(1).uniform(0.1, 9.0, 12), "differ by"),
        (GIVEN, GIVEN[:, 0] * 0.5, "all micro-batches take the same time"),
    ],
)
def test_times_that_say_nothing_are_refused(shapes: np.ndarray, seconds: np.ndarray, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fit_costs(shapes, seconds)
