import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m4train.config import CostConfig
from m4train.data.plan.balance import assign, imbalance
from m4train.data.plan.packing import Packer
from m4train.data.plan.plan import PlannedPack
from tests.unit.data.plan.test_packing import _units, obelics_lengths


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=70), st.integers(1, 9), st.integers(1, 5))
def test_every_pack_once_and_the_same_number_of_micro_batches(costs: list[float], ranks: int, size: int) -> None:
    assignment = assign(costs, ranks, size)
    assert len(assignment) == ranks
    assert len({len(groups) for groups in assignment}) == 1
    assert sorted(pack for groups in assignment for group in groups for pack in group) == list(range(len(costs)))
    assert all(len(group) <= size for groups in assignment for group in groups)


def test_64_packs_of_web_documents_are_balanced_over_8_ranks() -> None:
    packer = Packer(4096, 64, 64)
    packs = [pack for unit in _units(obelics_lengths(6_000)) if unit.tokens <= 4096 for pack in packer.add(unit)]
    costs = [PlannedPack(0, tuple(units)).cost(CostConfig()) for units in packs]
    steps = [costs[start : start + 64] for start in range(0, len(costs) - 63, 64)]
    assert len(steps) > 15
    by_cost = [imbalance(step, assign(step, 8, 2)) for step in steps]
    in_order = [[[list(range(rank * 8, rank * 8 + 8))] for rank in range(8)] for _ in steps]
    unbalanced = [imbalance(step, groups) for step, groups in zip(steps, in_order)]
    assert max(by_cost) < 0.03 < np.mean(unbalanced)
