"""Resuming in the middle of a large index: at once, with a small state, and without reading what is not needed."""

import json
import pickle
import time
from pathlib import Path

import pytest

from m4train.data.plan.plan import Plan
from tests.helpers.data import FakeProcessor, data_config, make_sources, synthetic_source


@pytest.mark.slow
def test_any_position_of_a_million_samples_is_reached_as_soon_as_the_first(tmp_path: Path) -> None:
    stored = pickle.dumps(synthetic_source(tmp_path, 1_000_000, 100))
    data = data_config(sequence_length=4096, images_per_pack=64, packing_pool=64)
    state = next(Plan([pickle.loads(stored)], data, 0, 64).steps()).state
    assert len(json.dumps(state)) < 100_000
    first = None
    for position in (0, 123_456, 999_990):
        state["streams"]["web"] = {"epoch": 3, "position": position}
        begun = time.process_time()
        source = pickle.loads(stored)
        step = next(Plan([source], data, 0, 64).steps(state))
        seconds = time.process_time() - begun
        first = first or seconds
        assert seconds < 3 * first + 0.1
        assert len(step.packs) == 64
        assert source.files.reads == 0


def test_resume_reads_the_payload_of_the_next_step_and_nothing_else(tmp_path: Path) -> None:
    from m4train.data.loading.loader import Loader

    sources, data = make_sources(tmp_path)
    state = [step for step, _ in zip(Plan(sources, data, 0, 4).steps(), range(6))][-1].state
    before = [source.files.reads for source in sources]
    loader = Loader(Plan(sources, data, 0, 4), FakeProcessor(), data, seed=0, micro_batch_size=4, state=state)
    step = next(iter(loader))
    images = [record.images for batch in step.micro_batches for record in batch.documents]
    reads = sum(source.files.reads for source in sources) - sum(before)
    assert reads == len(images) + sum(count > 0 for count in images)  # one for the text, one for its images together
