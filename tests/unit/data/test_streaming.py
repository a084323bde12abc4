import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m4train.config import SourceConfig
from m4train.data.streaming import PROMISES, StreamLoader
from m4train.errors import ConfigError
from tests.helpers.data import FakeProcessor, conversations, data_config, document, documents, write_shards

PROCESSOR = FakeProcessor()


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, SourceConfig]:
    key, content, images = document(0)
    broken = (key + "x", content, images | {"0.png": images["0.png"][:-60]})
    write_shards(tmp_path / "pages", [broken, *documents(39)], max_samples=10)
    write_shards(tmp_path / "digits", conversations(40), max_samples=10)
    piped = f"pipe:cat {tmp_path}/pages/shard-{{000000..000003}}.tar"
    return {
        "pages": SourceConfig(path=piped, weight=2.0),
        "digits": SourceConfig(path=f"{tmp_path}/digits/shard-{{000000..000003}}.tar"),
    }


def load(sources: dict[str, SourceConfig], data, stop: int = 12, **place) -> list:
    settings = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 2, "stop_step": stop} | place
    return list(StreamLoader(sources, PROCESSOR, data, **settings))


def test_pipes_feed_the_same_packs(sources: dict, caplog) -> None:
    data = data_config()
    with caplog.at_level(logging.WARNING):
        steps = load(sources, data)
    assert PROMISES in caplog.text
    assert [step.step for step in steps] == list(range(1, 13))
    keys: dict[str, int] = {}
    for step in steps:
        assert len(step.micro_batches) == 4
        for batch in step.micro_batches:
            assert batch.tokens <= batch.capacity == 512
            assert np.array_equal(batch.targets, batch.input_ids[batch.loss_positions + 1])
            assert len(batch.image_positions) == 2 * batch.images.count
            for record in batch.documents:
                keys[record.source] = keys.get(record.source, 0) + 1
    assert 1.6 < keys["pages"] / keys["digits"] < 2.4
    bad = [entry for step in steps for entry in step.bad]
    assert {(entry.key, entry.reason) for entry in bad} == {("doc00000x", "unreadable_image")}
    assert all(entry.step > 0 for entry in bad)


def test_ranks_and_workers_read_different_shards(sources: dict) -> None:
    data = data_config(num_workers=2)
    seen = []
    for rank in range(2):
        steps = load(sources, data, stop=2, rank=rank, world_size=2)
        seen.append({(d.source, d.shard) for step in steps for b in step.micro_batches for d in b.documents})
    assert seen[0]
    assert not seen[0] & seen[1]


def test_what_streams_cannot_do_is_refused(sources: dict) -> None:
    with pytest.raises(ConfigError, match="4 shards for 6 readers"):
        load(sources, replace(data_config(), num_workers=3), world_size=2, micro_batch_size=2)
    with pytest.raises(ConfigError, match="multiple of ranks"):
        load(sources, data_config(), world_size=3)
