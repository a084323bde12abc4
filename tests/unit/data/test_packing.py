import json
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m4train.data.packing import Packer, Unit

sizes = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), max_size=200)


def _units(values: list[tuple[int, int]]) -> list[Unit]:
    return [Unit(0, number, 0, 0, -1, tokens, frames) for number, (tokens, frames) in enumerate(values)]


@given(sizes, st.integers(1, 40))
def test_every_unit_is_packed_once_within_both_budgets(values: list[tuple[int, int]], pool: int) -> None:
    packer = Packer(100, 10, pool)
    units = _units(values)
    closed = [pack for unit in units for pack in packer.add(unit)]
    closed += packer.flush()
    assert Counter(unit for pack in closed for unit in pack) == Counter(units)
    for pack in closed:
        assert 0 < sum(unit.tokens for unit in pack) <= 100
        assert sum(unit.frames for unit in pack) <= 10


@given(sizes, st.integers(1, 40))
def test_no_unit_waits_for_more_packs_than_the_pool_held_before_it(values: list[tuple[int, int]], pool: int) -> None:
    packer, age, closed = Packer(100, 10, pool), {}, 0
    for unit in _units(values):
        age[unit.sample] = (closed, len(packer.state()))
        for pack in packer.add(unit):
            closed += 1
            for packed in pack:
                entered, before = age.pop(packed.sample)
                assert closed - entered <= before + 1


@given(sizes, st.integers(0, 199))
def test_state_continues_with_the_same_packs(values: list[tuple[int, int]], stop: int) -> None:
    straight, first, second = Packer(100, 10, 8), Packer(100, 10, 8), Packer(100, 10, 8)
    units = _units(values)
    whole = [pack for unit in units for pack in straight.add(unit)]
    part = [pack for unit in units[:stop] for pack in first.add(unit)]
    second.load_state(json.loads(json.dumps(first.state())))
    part += [pack for unit in units[stop:] for pack in second.add(unit)]
    assert whole + straight.flush() == part + second.flush()


def obelics_lengths(count: int) -> list[tuple[int, int]]:
    """Token and frame counts like those of OBELICS: about 2.5 images of 64 tokens a document, about 900 tokens."""
    rng = np.random.default_rng(0)
    images = np.minimum(1 + rng.geometric(0.4, count), 30)
    text = rng.lognormal(6.2, 0.9, count).astype(int) + 10
    return [(int(t + 64 * i), int(i)) for t, i in zip(text, images)]


def fill(lengths: list[tuple[int, int]], tokens: int, frames: int, pool: int = 64) -> tuple[float, float]:
    """Share of the token and of the frame budget that the packs of these lengths use."""
    packer = Packer(tokens, frames, pool)
    units = [unit for unit in _units(lengths) if unit.tokens <= tokens and unit.frames <= frames]
    closed = [pack for unit in units for pack in packer.add(unit)]
    used = [sum(column) for column in zip(*((unit.tokens, unit.frames) for pack in closed for unit in pack))]
    return used[0] / (tokens * len(closed)), used[1] / (frames * len(closed))


def test_packs_of_web_documents_are_full() -> None:
    lengths = obelics_lengths(20_000)
    assert 850 < np.mean([tokens for tokens, _ in lengths]) < 1000
    assert fill(lengths, 4096, 32)[0] > 0.995  # the image budget is twice the mean need
    assert fill(lengths, 4096, 20)[0] > 0.99  # it is hardly above the mean need
    assert fill(lengths, 8192, 28)[1] > 0.985  # it binds


def test_short_documents_fill_packs_that_hold_more_of_them_than_the_pool() -> None:
    rng = np.random.default_rng(0)
    lengths = [(int(n), 1) for n in rng.integers(20, 60, 20_000)]
    assert fill(lengths, 8192, 400)[0] > 0.995
