"""Every kind of damage to the bytes of a shard: never a wrong sample, never a hang, always a line in quarantine."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from m4train.config import SourceConfig
from m4train.data.collate import Collator
from m4train.data.loader import Loader
from m4train.data.plan import Plan
from m4train.data.source import build_sources
from m4train.errors import ConfigError
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards

PROCESSOR = FakeProcessor()
SAMPLES = 12


def read_all(folder: Path) -> tuple[dict[str, tuple], list]:
    """One epoch: ids and pixels of each document by key, and all that was quarantined."""
    data = data_config(sequence_length=512, epochs=1)
    sources = build_sources({"pages": SourceConfig(path=str(folder / "*.tar"))}, data, PROCESSOR)
    found, bad = {}, []
    for step in Loader(Plan(sources, data, 0, 1), PROCESSOR, data, seed=0, micro_batch_size=1):
        bad.extend(step.bad)
        [batch] = step.micro_batches
        frame = 0
        for number, record in enumerate(batch.documents):
            begin, end = batch.segments.cu_seqlens[number : number + 2].tolist()
            places = ((batch.image_positions >= begin) & (batch.image_positions < end)).sum().item()
            pixels = batch.images.pixels[frame : frame + places // 2]
            frame += places // 2
            found[record.key] = (batch.input_ids[begin:end].tolist(), pixels.numpy().copy())
    return found, bad


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def flip(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def zero(data: bytearray, rng: random.Random) -> bytearray:
    """Also over whole samples at the end: the shard must not look like a shorter one."""
    start = rng.randrange(len(data))
    size = min(rng.choice([1, 16, 512, 4096, 1 << 20]), len(data) - start)
    data[start : start + size] = bytes(size)
    return data


def swap(data: bytearray, rng: random.Random) -> bytearray:
    """Exchanges two blocks of the tar grid: headers, contents, or one with the other."""
    one, other = (512 * rng.randrange(len(data) // 512) for _ in range(2))
    data[one : one + 512], data[other : other + 512] = data[other : other + 512], data[one : one + 512]
    return data


def shift(data: bytearray, rng: random.Random) -> bytearray:
    """Loses some bytes, so that everything behind lies elsewhere."""
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 100, 512, 1536])]
    return data


def same(one: tuple, other: tuple) -> bool:
    return one[0] == other[0] and np.array_equal(one[1], other[1])


@pytest.mark.parametrize("damage", [truncate, flip, zero, swap, shift])
@pytest.mark.parametrize("indexed", [False, True], ids=["before_indexing", "after_indexing"])
def test_damage_never_gives_a_wrong_sample(tmp_path: Path, damage, indexed: bool) -> None:
    [path] = write_shards(tmp_path, documents(SAMPLES))
    original = path.read_bytes()
    clean, bad = read_all(tmp_path)
    assert len(clean) == SAMPLES
    assert not bad
    stamp = path.stat().st_mtime_ns
    lost = 0
    for seed in range(40):
        changed = bytes(damage(bytearray(original), random.Random(seed)))
        path.write_bytes(original if indexed else changed)
        os.utime(path, ns=(stamp, stamp + seed * 1000))
        if indexed:
            read_all(tmp_path)
            path.write_bytes(changed)
            os.utime(path, ns=(stamp, stamp + seed * 1000))
        try:
            found, bad = read_all(tmp_path)
        except ConfigError:  # no usable sample is left
            continue
        assert found.keys() <= clean.keys()
        for key, document in found.items():
            assert same(document, clean[key]), f"{damage.__name__} {seed}: {key} is not what was written"
        if len(found) < SAMPLES:
            lost += 1
            assert bad, f"{damage.__name__} {seed}: samples are gone without a word"
    assert lost > 5, "the damage hit nothing"


def test_a_shard_that_shrinks_while_it_is_read_costs_its_samples_only(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(SAMPLES))
    data = data_config(sequence_length=512, epochs=1)
    sources = build_sources({"pages": SourceConfig(path=str(tmp_path / "*.tar"))}, data, PROCESSOR)
    packs = [pack for step in Plan(sources, data, 0, 1).steps() for pack in step.packs]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    batch, bad = Collator(sources, PROCESSOR, data, 0).batch(packs, 1)
    assert 0 < len(batch.documents) < SAMPLES
    assert len(batch.documents) + len(bad) == sum(len(pack.units) for pack in packs)
    assert {entry.reason for entry in bad} == {"truncated"}
