"""Samples per second of reading and of the whole data path, side by side with webdataset and Energon on the same shards and
one core.

    python benchmarks/data.py [--samples 400] [--seconds 8]
    python benchmarks/data.py --index 10000000

"read": the bytes of every sample, in a shuffled order; that of the others is sequential, which favours them. "whole path":
read, decode, tokenise, cut into tiles, pack; the other sides read with webdataset or Energon, and then have Pillow, the
Pillow processor of transformers, and packing of neighbours. Energon is measured if it is installed (the extra `peers`). "plan": seconds of planning for a step of 10,000 documents, from an index alone. All run in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image

from m4train.config import DataConfig, SourceConfig
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan
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
        where = source.locate(number)
        shard, members = where.shard, where.members
        text = source.files.read(shard.shard, members[0].offset, members[0].size)
        images = form.stored_images(source.files, shard.shard, members, range(len(members) - 1))
        assert len(images) == 2
        assert text
        yield 1


def energon_samples(folder: Path) -> Any:
    """Every sample as Energon gives it without a cooker of its own: stored bytes by suffix."""
    import megatron.energon as energon
    from megatron.energon.flavors import BaseWebdatasetFactory

    if not (folder / ".nv-meta").exists():
        names = sorted(path.name for path in folder.glob("*.tar"))
        whole = {"split_parts_ratio": [("train", 1.0)], "shuffle_seed": None, "workers": 1}
        BaseWebdatasetFactory.prepare_dataset(folder, names, **whole)
        described = "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"
        (folder / ".nv-meta" / "dataset.yaml").write_text(described)

    class Keep(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

        def batch(self, samples):
            return samples

    alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    in_order = {"shuffle_buffer_size": None, "max_samples_per_sequence": None, "repeat": True}
    dataset = energon.get_train_dataset(folder, batch_size=1, worker_config=alone, task_encoder=Keep(), **in_order)
    return (sample for [sample] in energon.get_loader(dataset))


def read_energon(samples: Any) -> Iterator[int]:
    for sample in samples:
        assert sample["0.jpg"]
        yield 1


def path_theirs(samples: Any, processor) -> Iterator[int]:
    import json

    pack, filled = [], 0
    for sample in samples:
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


def alternate(name: str, ways: list[Callable[[], Iterator[int]]], seconds: float) -> None:
    """Prints the rates of all ways, measured in turns, and how many times that of each other the first one is."""
    rounds = np.array([[rate(way, seconds / 3) for way in ways] for _ in range(3)])
    rates = "".join(f"{each:12.1f}" for each in np.median(rounds, axis=0))
    ratios = "".join(f"{each:10.2f}x" for each in np.median(rounds[:, :1] / rounds[:, 1:], axis=0))
    print(f"{name:<12}{rates}{ratios}", flush=True)


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
        read = [lambda: read_ours(source), lambda: read_theirs(shards)]
        plain = lambda: webdataset.WebDataset(shards, shardshuffle=False)
        whole = [lambda: path_ours(source, ours, data), lambda: path_theirs(plain(), theirs)]
        names = ["m4train", "webdataset"]
        if importlib.util.find_spec("megatron") is not None:
            energon = energon_samples(Path(folder) / "shards")
            names.append("energon")
            read.append(lambda: read_energon(energon))
            whole.append(lambda: path_theirs(energon, theirs))
        print("samples a second of one core, and how many times those of the others:")
        print(f"{'':<12}" + "".join(f"{name:>12}" for name in names) + "".join(f" {name:>10}" for name in names[1:]))
        alternate("read", read, options.seconds)
        alternate("whole path", whole, options.seconds)
        print(f"{'plan':<12} {planning(Path(folder) / 'index'):10.3f} s for a step of 10,000 documents")


if __name__ == "__main__":
    main()
