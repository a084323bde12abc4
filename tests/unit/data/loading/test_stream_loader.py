import io
import json
import logging
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m4train.config import AugmentConfig, ImageOptions, SourceConfig
from m4train.data.loading.collate import Collator
from m4train.data.loading.shard_stream import ShardStream
from m4train.data.loading.stream_loader import PROMISES, StreamLoader
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.data.sources.tar import CanonicalTar
from m4train.data.sources.tar_formats import Pairs
from m4train.data.storage import files as storage
from m4train.errors import ConfigError, DataError
from tests.helpers.data import (
    FakeProcessor,
    conversations,
    data_config,
    document,
    documents,
    page_picture,
    png,
    write_shards,
)
from tests.helpers.processing import tiny_idefics3_processor

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


@pytest.mark.slow
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


def stream(path: str, position: float = 0.0, tar_format=None) -> ShardStream:
    urls = [f"pipe:cat {path}/shard-{number:06d}.tar" for number in range(4)]
    return ShardStream("pages", urls, tar_format or CanonicalTar(), "0 0", True, position)


def keys(stream: ShardStream, count: int) -> list[str]:
    return [streamed.key for streamed in islice(stream, count)]


def test_every_round_holds_every_sample_in_another_order(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(40), max_samples=10)
    whole = keys(stream(tmp_path), 400)
    assert len(set(whole)) == 40
    assert keys(stream(tmp_path), 100) == whole[:100]
    assert whole[:40] != sorted(whole[:40])
    assert min(Counter(whole).values()) >= 5


def test_a_stream_goes_on_near_where_it_was(sources: dict, tmp_path: Path) -> None:
    small = {"global_batch_size": 2}
    first = load(sources, data_config(shuffle=False), stop=3, **small)
    state = json.loads(json.dumps(first[-1].state))
    assert len(json.dumps(state)) < 1000
    assert 0 < state["positions"]["pages"] < 1
    [again] = load(sources, data_config(shuffle=False), stop=4, state=state, **small)
    assert again.step == 4
    resumed = {d.shard for b in again.micro_batches for d in b.documents if d.source == "pages"}
    assert min(resumed).endswith(f"{int(state['positions']['pages'] * 4):06d}.tar")
    with pytest.raises(DataError, match="a run with a plan"):
        load(sources, data_config(), state={"plan": "x", "step": 1})


def test_a_damaged_stream_keeps_what_came_before_and_is_named(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(10))
    path.write_bytes(path.read_bytes()[:20_000])
    cut = ShardStream("pages", [f"pipe:cat {path}"], CanonicalTar(), "0", False)
    found = keys(cut, 12)
    complete = [f"doc{number:05d}" for number in range(len(set(found)))]
    assert 3 < len(complete) < 10
    assert found == (complete * 4)[:12]
    assert {(entry.reason, entry.shard) for entry in cut.bad} == {("damaged_shard", f"pipe:cat {path}")}


def test_a_command_that_fails_is_run_again_and_then_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    [path] = write_shards(tmp_path, documents(10))
    tries = tmp_path / "tries"
    flaky = (
        f"pipe:echo x >> {tries}; if [ $(wc -l < {tries}) -lt 3 ]; then head -c 15000 {path}; exit 7; fi; cat {path}"
    )
    lapse = ShardStream("pages", [flaky], CanonicalTar(), "0", False)
    assert keys(lapse, 10) == [f"doc{number:05d}" for number in range(10)]
    assert not lapse.bad
    with pytest.raises(DataError, match=r"failed 8 times .*exit status 1"):
        keys(ShardStream("pages", [f"pipe:cat {tmp_path}/none.tar 2>/dev/null"], CanonicalTar(), "0", False), 1)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_without_a_usable_sample_ends_the_run_with_the_first_reason(tmp_path: Path, shuffle: bool) -> None:
    write_shards(tmp_path, documents(30), max_samples=10)
    path = f"{tmp_path}/shard-{{000000..000002}}.tar"
    data = data_config(shuffle=shuffle)
    with pytest.raises(
        DataError,
        match=r"streamed source 'pages' none of .*the first, doc.*: (no_text|missing_image), .*sources\.pages\.format",
    ):
        load({"pages": SourceConfig(path=path, format="pairs")}, data)
    with pytest.raises(DataError, match=r"none of .*too_long, .*do not fit a pack"):
        load({"pages": SourceConfig(path=path)}, replace(data, sequence_length=8))
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match=r"no sample can be used \(its shards are empty"):
        load({"pages": SourceConfig(path=str(tmp_path / "empty.tar"))}, data)


def test_a_source_of_which_little_is_usable_is_streamed_and_its_bad_samples_are_bounded(
    tmp_path: Path, monkeypatch
) -> None:
    key, content, images = document(0)
    broken = [(f"{key}x{number}", content, images | {"0.png": b"no image"}) for number in range(20)]
    write_shards(tmp_path, [*broken, document(1)])
    found = ShardStream("pages", [f"{tmp_path}/shard-000000.tar"], CanonicalTar(), "0", False)
    for streamed in islice(found, 4):
        assert streamed.key == "doc00001"
        found.used()
    assert len(found.bad) == 80
    monkeypatch.setattr("m4train.data.loading.shard_stream._MOST_IN_VAIN", 15)
    with pytest.raises(DataError, match="none of 15 samples in a row"):
        next(iter(ShardStream("pages", [f"{tmp_path}/shard-000000.tar"], CanonicalTar(), "0", False)))


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_sentence(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(3))
    with pytest.raises(DataError) as error:
        load({"pages": SourceConfig(path=f"{tmp_path}/shard-000000.tar", format="pairs")}, data_config(num_workers=1))
    assert "\n" not in str(error.value)


def test_other_formats_are_streamed_as_they_are_indexed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.JPG", png(page_picture("a"))), ("0.txt", b"A page."), ("1.txt", b"alone")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pairs = ShardStream("pairs", [str(tmp_path / "a.tar")], Pairs(), "0", False)
    streamed = next(iter(pairs))
    assert [item.get("text") for item in streamed.stored.sample.items] == [None, "A page."]
    assert np.array_equal(np.asarray(streamed.stored.decode([0], {})[0]), np.asarray(page_picture("a")))
    keys(pairs, 2)
    assert {(entry.key, entry.reason) for entry in pairs.bad} == {("1", "missing_image")}
    config = {"rows": SourceConfig(path="a.parquet", format="parquet", stream=True)}
    with pytest.raises(ConfigError, match="only tar files can be streamed"):
        load(config, data_config())


def test_streamed_images_are_decoded_as_planned_ones_are(tmp_path: Path) -> None:
    """The same pixels from both paths, whole and at the smaller scale that a JPEG can be decoded in."""
    buffer = io.BytesIO()
    Image.effect_mandelbrot((512, 384), (-2, -1.5, 1, 1.5), 60).convert("RGB").save(buffer, "jpeg")
    content = {"items": [{"image": "0.jpg"}, {"text": "A set."}]}
    write_shards(tmp_path, [("a", content, {"0.jpg": buffer.getvalue()})])
    processor, shard = tiny_idefics3_processor(split=True, tiles=3), f"{tmp_path}/shard-000000.tar"
    pixels = {}
    for scaled in (False, True):
        source = {"a": SourceConfig(path=shard, images=ImageOptions(scaled_decode=scaled))}
        data = data_config(sequence_length=200, images_per_pack=12, shuffle=False, augment=AugmentConfig())
        data.sources, data.packing_pool = source, 1
        settings = {"seed": 0, "global_batch_size": 1, "micro_batch_size": 1, "stop_step": 1}
        streamed = next(iter(StreamLoader(source, processor, data, **settings))).micro_batches[0]
        sources = build_sources(source, data, processor)
        pack = next(Plan(sources, replace(data, epochs=1), 0, 1).steps()).packs[0]
        planned, bad = Collator(sources, processor, data, 0).batch([pack], 1)
        assert not bad
        count = planned.images.count // len(pack.units)
        assert streamed.images.count % count == 0
        assert torch.equal(streamed.images.pixels[:count], planned.images.pixels[:count])
        pixels[scaled] = streamed.images.pixels[:count].float()
    assert not torch.equal(pixels[False], pixels[True])
    assert (pixels[False] - pixels[True]).abs().mean() < 8


def test_what_needs_an_index_is_refused(sources: dict) -> None:
    config = {"pages": replace(sources["pages"], stream=True)}
    with pytest.raises(ConfigError, match=r"data\.sources\.pages\.stream=false"):
        build_sources(config, data_config(), PROCESSOR)
