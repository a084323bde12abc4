import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m4train.data.balance import assign, imbalance


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=70), st.integers(1, 9), st.integers(1, 5))
def test_every_pack_once_and_the_same_number_of_micro_batches(costs: list[float], ranks: int, size: int) -> None:
    assignment = assign(costs, ranks, size)
    assert len(assignment) == ranks
    assert len({len(groups) for groups in assignment}) == 1
    assert sorted(pack for groups in assignment for group in groups for pack in group) == list(range(len(costs)))
    assert all(len(group) <= size for groups in assignment for group in groups)


def test_ranks_are_balanced() -> None:
    costs = (4096 + np.random.default_rng(0).normal(0, 400, 64)).tolist()
    assert imbalance(costs, assign(costs, 8, 2)) < 0.03
