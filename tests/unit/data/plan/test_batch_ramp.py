"""A ramp of the batch size is part of the plan: the same steps however often a run is stopped, on any number of ranks."""

import json
from pathlib import Path

import pytest

from m4train.config import BatchRampConfig
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from tests.helpers.data import FakeProcessor, make_sources

RAMP = BatchRampConfig(start=2, increment=3, steps=2)
SIZES = [2, 2, 5, 5, 7, 7]  # with a global batch size of 7


def _hashes(plan, data, ranks, state, until):
    """`data_hash` of each step summed over ranks, the micro-batches of each rank, and the state after the last step."""
    place = {"world_size": ranks, "micro_batch_size": 2, "seed": 0, "state": state, "stop_step": until}
    loaders = [Loader(plan, FakeProcessor(), data, rank=rank, **place) for rank in range(ranks)]
    hashes = []
    for steps in zip(*loaders, strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1
        hashes.append(sum(batch.data_hash for step in steps for batch in step.micro_batches) % 2**64)
    return hashes, json.loads(json.dumps(steps[0].state))


@pytest.mark.slow
def test_a_ramp_goes_on_at_any_step_on_other_ranks(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    plan = Plan(sources, data, 0, 7, RAMP)
    steps = [step for step, _ in zip(plan.steps(), range(6))]
    assert [len(step.packs) for step in steps] == SIZES
    assert [pack.number for step in steps for pack in step.packs] == list(range(sum(SIZES)))
    whole, _ = _hashes(plan, data, 1, None, 6)
    for stop, before, after in ((2, 3, 1), (3, 1, 2)):
        first, state = _hashes(plan, data, before, None, stop)
        assert first + _hashes(plan, data, after, state, 6)[0] == whole


def test_the_packs_are_those_of_a_run_without_a_ramp(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    with_ramp, without = (
        [pack for step, _ in zip(Plan(sources, data, 0, 7, *ramp).steps(), range(4)) for pack in step.packs]
        for ramp in ((RAMP,), ())
    )
    assert with_ramp == without[: sum(SIZES[:4])]


def test_another_ramp_holds_from_where_the_run_goes_on(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    state = next(iter(Plan(sources, data, 0, 7, RAMP).steps())).state
    other = Plan(sources, data, 0, 7, BatchRampConfig(start=3, increment=3, steps=2))
    rest = [step for step, _ in zip(other.steps(state), range(4))]
    assert [len(step.packs) for step in rest] == [3, 6, 6, 7]
    whole = [pack for step, _ in zip(Plan(sources, data, 0, 7).steps(), range(5)) for pack in step.packs]
    seen = [pack for step in rest for pack in step.packs]
    assert seen == whole[SIZES[0] : SIZES[0] + len(seen)]
