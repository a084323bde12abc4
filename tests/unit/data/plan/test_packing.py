import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m4train.data.plan.packing import Packer, Unit

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


def obelics_lengths(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Token and frame counts like those of OBELICS: about 2.5 images of 64 tokens a document, about 900 tokens."""
    rng = np.random.default_rng(seed)
    images = np.minimum(rng.geometric(0.4, count), 30)
    text = rng.lognormal(6.2, 0.9, count).astype(int) + 10
    return [(int(t + 64 * i), int(i)) for t, i in zip(text, images)]


def fills(lengths: list[tuple[int, int]], tokens: int, frames: int, pool: int = 128) -> np.ndarray:
    """Shares of the token and of the frame budget that each pack of these lengths uses: (packs, 2)."""
    packer = Packer(tokens, frames, pool)
    units = [unit for unit in _units(lengths) if unit.tokens <= tokens and unit.frames <= frames]
    closed = [pack for unit in units for pack in packer.add(unit)]
    used = [[sum(unit.tokens for unit in pack), sum(unit.frames for unit in pack)] for pack in closed]
    return np.array(used) / (tokens, frames)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packs_of_web_documents_are_full(seed: int) -> None:
    """A document takes 2.5 frames and 910 tokens on average, so that 11.3 frames go with 4,096 tokens."""
    lengths = obelics_lengths(4_000, seed)
    assert 850 < np.mean([tokens for tokens, _ in lengths]) < 1000
    assert 2.4 < np.mean([frames for _, frames in lengths]) < 2.6
    packs = {frames: fills(lengths, 4096, frames) for frames in (8, 12, 13, 23)}
    assert packs[23][:, 0].mean() > 0.995  # twice the mean need
    assert packs[13][:, 0].mean() > 0.99  # hardly above it
    assert packs[8][:, 1].mean() > 0.985  # images bind
    assert packs[12].mean(axis=0).max() > 0.96  # near balance some packs are full of text and others of images
    assert all(each.max(axis=1).mean() > 0.998 for each in packs.values())
    assert fills(lengths, 8192, 18)[:, 1].mean() > 0.99


def test_short_documents_fill_packs_that_hold_more_of_them_than_the_pool() -> None:
    rng = np.random.default_rng(0)
    lengths = [(int(n), 1) for n in rng.integers(20, 60, 20_000)]
    assert fills(lengths, 8192, 400)[:, 0].mean() > 0.995
