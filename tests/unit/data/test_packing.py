from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m4train.data.packing import Packer, Unit

sizes = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), max_size=200)


def _units(values: list[tuple[int, int]]) -> list[Unit]:
    return [Unit(0, number, 0, 0, -1, tokens, frames) for number, (tokens, frames) in enumerate(values)]


@given(sizes, st.integers(1, 6))
def test_every_unit_is_packed_once_within_both_budgets(values: list[tuple[int, int]], open_packs: int) -> None:
    packer = Packer(100, 10, open_packs)
    units = _units(values)
    closed = []
    for unit in units:
        closed += packer.add(unit)
        assert len(packer.open) <= open_packs
    closed += packer.flush()
    assert Counter(unit for pack in closed for unit in pack) == Counter(units)
    for pack in closed:
        assert 0 < sum(unit.tokens for unit in pack) <= 100
        assert sum(unit.frames for unit in pack) <= 10


@given(sizes, st.integers(0, 199))
def test_state_continues_with_the_same_packs(values: list[tuple[int, int]], stop: int) -> None:
    straight, first, second = Packer(100, 10, 4), Packer(100, 10, 4), Packer(100, 10, 4)
    units = _units(values)
    whole = [pack for unit in units for pack in straight.add(unit)]
    part = [pack for unit in units[:stop] for pack in first.add(unit)]
    second.load_state(first.state())
    part += [pack for unit in units[stop:] for pack in second.add(unit)]
    assert whole + straight.flush() == part + second.flush()


def obelics_lengths(count: int) -> list[tuple[int, int]]:
    """Token and frame counts like those of OBELICS: about 2.5 images of 64 tokens a document, about 900 tokens."""
    rng = np.random.default_rng(0)
    images = np.minimum(1 + rng.geometric(0.4, count), 30)
    text = rng.lognormal(6.2, 0.9, count).astype(int) + 10
    return [(int(t + 64 * i), int(i)) for t, i in zip(text, images)]


def test_packs_of_web_documents_are_full() -> None:
    units = [unit for unit in _units(obelics_lengths(20_000)) if unit.tokens <= 4096]
    mean = np.mean([unit.tokens for unit in units])
    assert 800 < mean < 1000
    packer = Packer(4096, 64, 32)
    closed = [pack for unit in units for pack in packer.add(unit)]
    fill = sum(unit.tokens for pack in closed for unit in pack) / (4096 * len(closed))
    assert fill > 0.98
