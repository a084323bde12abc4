import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m4train.config import CostConfig
from m4train.data.plan.balance import assign, assign_by_kind, imbalance
from m4train.data.plan.packing import Packer
from m4train.data.plan.plan import PlannedPack
from m4train.pack_costs import PackCosts, fit_costs
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
    costs = [
        PlannedPack(0, tuple(units)).cost(PackCosts(0.0, 1.0, CostConfig.squared, CostConfig.frame)) for units in packs
    ]
    steps = [costs[start : start + 64] for start in range(0, len(costs) - 63, 64)]
    assert len(steps) > 15
    by_cost = [imbalance(step, assign(step, 8, 2)) for step in steps]
    in_order = [[[list(range(rank * 8, rank * 8 + 8))] for rank in range(8)] for _ in steps]
    unbalanced = [imbalance(step, groups) for step, groups in zip(steps, in_order)]
    assert max(by_cost) < 0.03 < np.mean(unbalanced)


def test_ranks_on_slow_devices_get_the_cheap_packs() -> None:
    costs = [float(cost) for cost in range(1, 17)]
    assignment = assign_by_kind([costs, [3 * cost for cost in costs]], [0, 0, 0, 1], 2)
    loads = [sum(costs[pack] for group in groups for pack in group) for groups in assignment]
    assert sorted(pack for groups in assignment for group in groups for pack in group) == list(range(16))
    assert {len(groups) for groups in assignment} == {2}
    assert loads[3] == min(loads)
    assert 3 * loads[3] < 3 * sum(costs) / 4


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=40), st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_every_pack_once_on_several_kinds(costs: list[float], kinds: list[int]) -> None:
    assignment = assign_by_kind([[(kind + 1) * cost for cost in costs] for kind in range(3)], kinds, 2)
    assert sorted(pack for groups in assignment for group in groups for pack in group) == list(range(len(costs)))
    assert len({len(groups) for groups in assignment}) == 1
    assert all(len(group) <= 2 for groups in assignment for group in groups)


def test_packs_shared_by_a_fit_of_a_dozen_times_are_balanced_where_constants_are_not() -> None:
    """Four packs a rank, with the costs of a small model (frames twice as dear as the constants say, attention 40 times)."""
    packer, rng = Packer(4096, 64, 64), np.random.default_rng(0)
    units = [pack for unit in _units(obelics_lengths(6_000)) if unit.tokens <= 4096 for pack in packer.add(unit)]
    packs = [PlannedPack(number, tuple(pack)) for number, pack in enumerate(units)]
    true = PackCosts(0.0, 1e-3, 4e-7, 0.25)
    times = [pack.cost(true) * (1 + 0.01 * rng.standard_normal()) for pack in packs]
    known = sorted(range(len(packs)), key=lambda number: packs[number].squared)[:: len(packs) // 12]
    shapes = [(1, packs[number].tokens, packs[number].squared, packs[number].frames) for number in known]
    fit, _ = fit_costs(shapes, [times[number] for number in known])
    worst = {}
    for name, costs in (("fit", fit), ("constants", PackCosts(0.0, 1.0, CostConfig.squared, CostConfig.frame))):
        steps = [range(start, start + 32) for start in range(0, len(packs) - 31, 32)]
        worst[name] = np.mean(
            [imbalance([times[n] for n in step], assign([packs[n].cost(costs) for n in step], 8, 1)) for step in steps]
        )
    assert worst["fit"] < 0.03
    assert worst["fit"] < worst["constants"] / 1.5


@pytest.mark.parametrize(("ranks", "each", "within"), [(8, 4, 0.01), (32, 4, 0.02), (64, 8, 0.001)])
def test_exchanges_reach_what_the_greedy_way_does_not(ranks: int, each: int, within: float) -> None:
    costs = (1 + 0.08 * np.random.default_rng(0).standard_normal(ranks * each)).tolist()
    assert imbalance(costs, assign(costs, ranks, 1)) < within
