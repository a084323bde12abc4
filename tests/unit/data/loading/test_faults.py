"""Every kind of damage to the bytes of a shard: never a wrong sample, never a hang, always a line in quarantine."""

import base64
import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.documents.rendering import Renderer
from m4train.data.index.build import open_index
from m4train.data.loading.collate import Collator
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.data.source import Source, build_sources
from m4train.data.sources.registry import shard_format
from m4train.errors import ConfigError, DataError
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards

PROCESSOR = FakeProcessor()
SAMPLES = 12
DATA = data_config(sequence_length=512, epochs=1)


def opened(path: Path, form: str = "canonical") -> Source:
    [source] = build_sources({"pages": SourceConfig(path=str(path), format=form)}, DATA, PROCESSOR)
    return source


def read_all(source: Source) -> tuple[dict[str, tuple], list]:
    """One epoch: ids and pixels of each document by key, and all that was quarantined."""
    found, bad = {}, []
    for step in Loader(Plan([source], DATA, 0, 1), PROCESSOR, DATA, seed=0, micro_batch_size=1):
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


def all_are_named(path: Path, form: str = "canonical") -> bool:
    """Whether the index of a file without a usable sample says of everything it holds, and of something, why not."""
    [index] = open_index(
        [str(path)], shard_format(SourceConfig(format=form)), Renderer(PROCESSOR, SourceConfig()), None, 99
    )
    return sorted(index.bad) == list(range(len(index))) != [] and all(all(why) for why in index.bad.values())


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
    clean, bad = read_all(opened(path))
    assert len(clean) == SAMPLES
    assert not bad
    stamp = path.stat().st_mtime_ns
    lost = 0
    for seed in range(40):
        changed = bytes(damage(bytearray(original), random.Random(seed)))
        path.write_bytes(original if indexed else changed)
        os.utime(path, ns=(stamp, stamp + seed * 1000))
        if indexed:
            read_all(opened(path))
            path.write_bytes(changed)
            os.utime(path, ns=(stamp, stamp + seed * 1000))
        try:
            found, bad = read_all(opened(path))
        except ConfigError:  # no usable sample is left
            assert all_are_named(path), f"{damage.__name__} {seed}: samples are gone without a word"
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
    sources = [opened(path)]
    packs = [pack for step in Plan(sources, DATA, 0, 1).steps() for pack in step.packs]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    batch, bad = Collator(sources, PROCESSOR, DATA, 0).batch(packs, 1)
    assert 0 < len(batch.documents) < SAMPLES
    assert len(batch.documents) + len(bad) == sum(len(pack.units) for pack in packs)
    assert {entry.reason for entry in bad} == {"truncated"}


Listed = list[tuple[str, list[str | None], list[bytes | None]]]  # key, and parallel lists of texts and images


def listed(count: int) -> Listed:
    return [
        (
            key,
            [item.get("text") for item in content["items"]],
            [images.get(item.get("image")) for item in content["items"]],
        )
        for key, content, images in documents(count)
    ]


def write_tar(path: Path, members: dict[str, bytes | str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pairs(path: Path, samples: Listed) -> None:
    members: dict[str, bytes | str] = {}
    for key, texts, images in samples:
        record = json.dumps({"url": f"http://a/{key}", "caption": "another"})
        members |= {f"{key}.png": images[1], f"{key}.json": record, f"{key}.txt": texts[0]}
    write_tar(path, members)


def m4_documents(path: Path, samples: Listed) -> None:
    """Every second one lists its members."""
    members: dict[str, bytes | str] = {}
    for number, (key, texts, images) in enumerate(samples):
        parts = {
            f"{key}.{place}.image.png" if text is None else f"{key}.{place}.text.txt": image if text is None else text
            for place, (text, image) in enumerate(zip(texts, images))
        }
        members |= parts | ({f"{key}.metadata.txt": repr(list(parts))} if number % 2 else {})
    write_tar(path, members)


def energon(path: Path, samples: Listed) -> None:
    members: dict[str, bytes | str] = {}
    for key, texts, images in samples:
        names = [None if image is None else f"{place}.png" for place, image in enumerate(images)]
        members[f"{key}.json"] = json.dumps({"texts": texts, "images": names})
        members |= {f"{key}.{name}": image for name, image in zip(names, images) if name}
    write_tar(path, members)


def mint1t(path: Path, samples: Listed) -> None:
    members: dict[str, bytes | str] = {}
    for key, texts, images in samples:
        frames = [Image.open(io.BytesIO(image)) for image in images if image]
        tiff = io.BytesIO()
        frames[0].save(tiff, "tiff", save_all=True, append_images=frames[1:])
        sizes = [{"width": frame.width, "height": frame.height} for frame in frames]
        record = {"texts": texts, "images": [image and f"page_{place}" for place, image in enumerate(images)]}
        members[f"{key}.json"] = json.dumps(record | {"image_metadata": sizes})
        members[f"{key}.tiff"] = tiff.getvalue()
    write_tar(path, members)


def json_array(path: Path, samples: Listed) -> None:
    coded = [[image and base64.b64encode(image).decode() for image in images] for _, _, images in samples]
    records = [
        {"texts": texts, "images": [image and "data:image/png;base64," + image for image in images]}
        for (_, texts, _), images in zip(samples, coded)
    ]
    path.write_text(json.dumps(records))


def parquet(path: Path, samples: Listed) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"texts": texts, "images": images} for _, texts, images in samples]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


OTHERS = {
    "pairs": pairs,
    "m4_documents": m4_documents,
    "energon": energon,
    "mint1t": mint1t,
    "json": json_array,
    "parquet": parquet,
}


def written(folder: Path, form: str) -> tuple[Path, Source, dict[str, tuple]]:
    """A file of the format, opened, and its samples."""
    path = folder / "samples"
    OTHERS[form](path, listed(SAMPLES))
    source = opened(path, form)
    clean, bad = read_all(source)
    assert len(clean) == SAMPLES
    assert not bad
    return path, source, clean


@pytest.mark.parametrize("form", OTHERS)
def test_damage_after_indexing_never_gives_a_wrong_sample_of_another_format(tmp_path: Path, form: str) -> None:
    path, source, clean = written(tmp_path, form)
    original, lost = path.read_bytes(), 0
    for damage in (truncate, flip, zero, swap, shift):
        for seed in range(5):
            path.write_bytes(damage(bytearray(original), random.Random(seed)))
            try:
                found, bad = read_all(pickle.loads(pickle.dumps(source)))  # with nothing of the file kept in memory
            except DataError as error:
                assert form == "parquet", "only what lies at its end says where its samples are"
                assert str(path) in str(error)  # noqa: PT017
                continue
            named = {entry.key for entry in bad}
            assert named | found.keys() == clean.keys(), f"{damage.__name__} {seed}: samples are gone without a word"
            for key, document in found.items():
                assert same(document, clean[key]), f"{damage.__name__} {seed}: {key} is not what was written"
            lost += bool(named)
    assert lost > 5, "the damage hit nothing"


@pytest.mark.parametrize("form", OTHERS)
def test_a_file_of_another_format_that_lost_bytes_gives_whole_samples_and_says_so(tmp_path: Path, form: str) -> None:
    """Other damage before indexing shows only where there are checksums, which these formats do not have."""
    path, _, clean = written(tmp_path, form)
    original = path.read_bytes()
    kinds = (truncate,) if form in ("json", "parquet") else (truncate, shift)
    for damage, seed in ((damage, seed) for damage in kinds for seed in range(6)):
        path.write_bytes(damage(bytearray(original), random.Random(seed)))
        try:
            found, bad = read_all(opened(path, form))
        except ConfigError:  # no usable sample is left
            assert all_are_named(path, form), f"{damage.__name__} {seed}: samples are gone without a word"
            continue
        except DataError as refusal:
            named = form == "parquet" and str(path) in str(refusal)
            assert named, "only parquet, whose end says where its samples are, is refused as a whole"
            continue
        assert bad, f"{damage.__name__} {seed}: samples are gone without a word"
        for key, document in found.items():
            assert same(document, clean[key]), f"{damage.__name__} {seed}: {key} is not what was written"
