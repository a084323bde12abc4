"""The sequence of steps is the same wherever it is stopped, and on whatever it continues."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m4train.data.loader import Loader
from m4train.data.plan import Plan
from tests.helpers.data import FakeProcessor, make_sources

STEPS = 24


def hashes(sources, data, world: int, state=None, stop: int = STEPS, batch: int = 10) -> tuple[dict[int, tuple], dict]:
    """Per step, the sums over ranks of data_hash and loss tokens; and the state after the last."""
    found: dict[int, list[int]] = {}
    for rank in range(world):
        plan = Plan(sources, data, 5, batch)
        loader = Loader(
            plan,
            FakeProcessor(),
            data,
            seed=5,
            micro_batch_size=2,
            rank=rank,
            world_size=world,
            state=state,
            stop_step=stop,
        )
        for step in loader:
            entry = found.setdefault(step.step, [0, 0, 0])
            entry[0] = (entry[0] + sum(b.data_hash for b in step.micro_batches)) % 2**64
            entry[1] += step.loss_tokens
            entry[2] += step.documents
            last = json.loads(json.dumps(step.state))
    return {step: tuple(entry) for step, entry in found.items()}, last


@pytest.mark.parametrize(("stop", "first", "second"), [(1, 1, 3), (7, 3, 8), (13, 8, 2), (14, 5, 1), (23, 2, 5)])
def test_any_stop_continues_on_any_number_of_ranks(tmp_path: Path, stop: int, first: int, second: int) -> None:
    sources, data = make_sources(tmp_path)
    whole, _ = hashes(sources, data, 1)
    begun, state = hashes(sources, data, first, stop=stop)
    rest, _ = hashes(sources, data, second, state)
    assert begun | rest == whole
    assert set(rest) == set(range(stop + 1, STEPS + 1))
    assert len(json.dumps(state)) < 100_000


@pytest.mark.slow
def test_any_stop_continues_on_any_number_of_workers(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    whole, _ = hashes(sources, data, 1)
    begun, state = hashes(sources, replace(data, num_workers=3), 1, stop=6)
    middle, state = hashes(sources, replace(data, num_workers=1), 2, state, stop=11)
    rest, _ = hashes(sources, data, 3, state)
    assert begun | middle | rest == whole
