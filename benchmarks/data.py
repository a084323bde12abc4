"""Samples per second of reading and of the whole data path, side by side with webdataset on the same shards and one core.

    python benchmarks/data.py [--samples 400] [--seconds 8]
    python benchmarks/data.py --index 10000000

"read": the bytes of every sample, in a shuffled order; webdataset's order is sequential, which favours it. "whole path":
read, decode, tokenise, cut into tiles, pack; the other side is webdataset, Pillow, the Pillow processor of transformers, and
packing of neighbours. "plan": seconds of planning for a step of 10,000 documents, from an index alone. All run in turns.
"""

from __future__ import annotations

import argparse
import io
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image

from m4train.config import DataConfig, SourceConfig
from m4train.data.collate import Collator
from m4train.data.plan import Plan
from m4train.data.shards import ShardWriter
from m4train.data.source import Source, build_sources
from tests.helpers.data import synthetic_source
from tests.helpers.processing import tiny_idefics3_processor

TEXT = "river hill cloud stone path tree light water house window people walking under green sky"
WORDS = TEXT.split()
TOKENS = 8192


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def write_samples(folder: Path, samples: int) -> None:
    """Documents of about 300 words and two photos."""
    rng = np.random.default_rng(0)
    photos = [photo(rng, 640, 480) for _ in range(16)]
    with ShardWriter(folder, max_samples=100) as writer:
        for number in range(samples):
            texts = [" ".join(rng.choice(WORDS, rng.integers(40, 160))) for _ in range(3)]
            items = [{"text": texts[0]}, {"image": "0.jpg"}, {"text": texts[1]}, {"image": "1.jpg"}, {"text": texts[2]}]
            images = {f"{place}.jpg": photos[int(rng.integers(16))] for place in range(2)}
            writer.write(f"{number:06d}", {"items": items}, images)


def rate(iterate: Callable[[], Iterator[int]], seconds: float) -> float:
    """Samples per second of CPU time, so that other work on the machine matters less; `iterate` yields how many each of its steps dealt with."""
    samples, begun = 0, time.process_time()
    while time.process_time() - begun < seconds:
        for done in iterate():
            samples += done
            if time.process_time() - begun >= seconds:
                break
    return samples / (time.process_time() - begun)


def read_theirs(shards: list[str]) -> Iterator[int]:
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        assert sample["0.jpg"]
        yield 1


def read_ours(source: Source) -> Iterator[int]:
    form = source.shard_format
    for number in np.random.default_rng(0).permutation(len(source)).tolist():
        shard, place = source.index.locate(number)
        members = shard.members(place)
        text = source.files.read(shard.shard, members[0].offset, members[0].size)
        images = form.stored_images(source.files, shard.shard, members, range(len(members) - 1))
        assert len(images) == 2
        assert text
        yield 1


def path_theirs(shards: list[str], processor) -> Iterator[int]:
    import json

    pack, filled = [], 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        items = json.loads(sample["json"])["items"]
        text = "".join(item.get("text", "<image>") for item in items)
        images = [Image.open(io.BytesIO(sample[item["image"]])).convert("RGB") for item in items if "image" in item]
        inputs = processor(text=text, images=images, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if filled + length > TOKENS:
            torch.cat([document["input_ids"][0] for document in pack])
            torch.cat([document["pixel_values"][0] for document in pack])
            pack, filled = [], 0
        pack.append(inputs)
        filled += length
        yield 1


def path_ours(source: Source, processor, data: DataConfig) -> Iterator[int]:
    collator = Collator([source], processor, data, 0)
    for step in Plan([source], data, 0, 1).steps():
        batch, _ = collator.batch(step.packs, step.step)
        yield len(batch.documents)


def alternate(
    name: str, ours: Callable[[], Iterator[int]], theirs: Callable[[], Iterator[int]], seconds: float
) -> None:
    rounds = [(rate(ours, seconds / 3), rate(theirs, seconds / 3)) for _ in range(3)]
    mine, other = np.median(rounds, axis=0)
    print(f"{name:<12} {mine:10.1f} {other:10.1f} {np.median([a / b for a, b in rounds]):8.2f}x", flush=True)


def planning(folder: Path) -> float:
    """Seconds for a step of about 10,000 documents."""
    source = synthetic_source(folder, 100_000, 10)
    steps = Plan([source], DataConfig(sequence_length=TOKENS), 0, 2_200).steps()
    documents = sum(len(pack.units) for pack in next(steps).packs)
    begun = time.process_time()
    for _ in range(3):
        next(steps)
    return (time.process_time() - begun) / 3 * 10_000 / documents


def large_index(folder: Path, samples: int) -> None:
    """What an index of so many samples costs: on disk, in memory, and in time to continue in its middle."""
    stored = pickle.dumps(synthetic_source(folder, samples, max(1, samples // 10_000)))
    size = sum(path.stat().st_size for path in folder.iterdir()) / samples
    data = DataConfig(sequence_length=TOKENS)
    state = next(Plan([pickle.loads(stored)], data, 0, 64).steps()).state
    state["streams"]["web"]["position"] = samples // 2
    before, begun = psutil.Process().memory_full_info().uss, time.perf_counter()
    source = pickle.loads(stored)
    steps = Plan([source], data, 0, 64).steps(state)
    next(steps)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(50):
        next(steps)
    each = (time.perf_counter() - begun) / 50
    grown = (psutil.Process().memory_full_info().uss - before) / 2**20
    print(f"index of {samples}: {size:.0f} bytes a sample, {grown:.0f} MiB resident (mapped files), ", end="")
    print(f"first step after {first:.2f} s, then {1000 * each:.1f} ms a step of 64 packs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=8.0, help="per measurement")
    parser.add_argument("--index", type=int, help="only measure an index of this many samples, such as 10000000")
    options = parser.parse_args()
    if options.index:
        with tempfile.TemporaryDirectory() as folder:
            large_index(Path(folder), options.index)
        return
    torch.set_num_threads(1)
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder) / "shards", options.samples)
        ours = tiny_idefics3_processor(f"{folder}/processor", image_size=364, image_seq_len=169, split=True, tiles=2)
        theirs = AutoProcessor.from_pretrained(f"{folder}/processor", backend="pil")
        data = DataConfig(sequence_length=TOKENS, images_per_pack=64, long_documents="drop")
        pattern = f"{folder}/shards/*.tar"
        [source] = build_sources({"photos": SourceConfig(path=pattern)}, data, ours)
        shards = sorted(str(path) for path in Path(folder, "shards").glob("*.tar"))
        print(f"{'one core':<12} {'m4train':>10} {'webdataset':>10} {'ratio':>9}   (samples per second of one core)")
        alternate("read", lambda: read_ours(source), lambda: read_theirs(shards), options.seconds)
        whole = (lambda: path_ours(source, ours, data)), (lambda: path_theirs(shards, theirs))
        alternate("whole path", *whole, options.seconds)
        print(f"{'plan':<12} {planning(Path(folder) / 'index'):10.3f} s for a step of 10,000 documents")


if __name__ == "__main__":
    main()
