"""Samples per second of reading and of the whole data path, side by side with what a user would write instead, from the same
files, on one core.

    PYTHONPATH=. python benchmarks/data.py [--samples 400] [--seconds 8] [--formats tar parquet json]
    PYTHONPATH=. python benchmarks/data.py --index 10000000

"read": the bytes of every sample, in a shuffled order; that of the others is sequential, which favours them. "whole path":
read, decode, tokenise, cut into tiles, pack. The other sides read with webdataset or Energon, with pyarrow, or with a torch
Dataset over a JSON file and a folder of pictures; then Pillow decodes, the processor of transformers encodes (its Pillow backend,
and its torchvision backend if that is installed; "uint8": neither rescaled nor normalised, which training may leave to the device
as m4train does), and neighbours are packed. "pil" is m4train with Pillow's resampling; training resizes with torch unless it is told
otherwise. What both sides make of the same samples is compared first. Energon is measured if it is installed (the extra `peers`).
"plan": seconds of planning for a step of 10,000 documents, from an index alone. All run in turns, in processor time.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import json
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

from benchmarks.gpu import write_samples
from m4train.config import DataConfig, SourceConfig
from m4train.data.loading.collate import Collator
from m4train.data.plan.packing import Unit
from m4train.data.plan.plan import Plan, PlannedPack
from m4train.data.source import Source, build_sources
from tests.helpers.data import synthetic_source
from tests.helpers.processing import tiny_idefics3_processor

TOKENS = 8192


def conversation(path: Path) -> Iterator[tuple[str, list[str], list[bytes]]]:
    """Key, texts and pictures of the samples of a folder of shards, for other ways to store them."""
    for sample in webdataset.WebDataset(sorted(map(str, path.glob("*.tar"))), shardshuffle=False):
        items = json.loads(sample["json"])["items"]
        texts = [item["text"] for item in items if "text" in item]
        yield sample["__key__"], texts, [sample[item["image"]] for item in items if "image" in item]


def parquet_of(shards: Path, folder: Path, rows: int = 50) -> None:
    """The samples of tar shards as rows in the form of The Cauldron, in two files with row groups of so many rows."""
    import pyarrow
    import pyarrow.parquet

    made = [
        {
            "images": [{"bytes": data, "path": None} for data in images],
            "texts": [{"user": " ".join(texts[:2]), "assistant": texts[2]}],
        }
        for _, texts, images in conversation(shards)
    ]
    folder.mkdir(exist_ok=True)
    for number in range(2):
        part = made[number * len(made) // 2 : (number + 1) * len(made) // 2]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{number}.parquet", row_group_size=rows)


def json_of(shards: Path, folder: Path) -> None:
    """The samples of tar shards as LLaVA has them: a JSON file, and a folder of pictures."""
    (folder / "images").mkdir(parents=True)
    records = []
    for key, texts, images in conversation(shards):
        names = [f"images/{key}-{number}.jpg" for number in range(len(images))]
        for name, data in zip(names, images):
            (folder / name).write_bytes(data)
        turns = [{"from": "human", "value": "<image><image>" + " ".join(texts[:2])}, {"from": "gpt", "value": texts[2]}]
        records.append({"id": key, "image": names, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))


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


def path_theirs(samples: Any, processor: Any, **settings: Any) -> Iterator[int]:
    """Documents of webdataset or Energon, decoded, encoded and packed."""
    return packed(map(document_of, samples), processor, **settings)


def document_of(sample: dict[str, Any]) -> tuple[str, list[Image.Image]]:
    items = json.loads(sample["json"])["items"]
    text = "".join(item.get("text", "<image>") for item in items)
    return text, [Image.open(io.BytesIO(sample[item["image"]])).convert("RGB") for item in items if "image" in item]


def rows_of(files: list[str], processor: Any) -> Iterator[tuple[str, list[Image.Image]]]:
    """Text and pictures of parquet rows, read as pyarrow reads them."""
    import pyarrow.parquet

    for path in files:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in row["images"]]
                [turn] = row["texts"]
                yield chat(processor, len(images), turn["user"], turn["assistant"]), images


class Records(torch.utils.data.Dataset):
    """A LLaVA file as a torch Dataset."""

    def __init__(self, path: Path, processor: Any) -> None:
        self.records, self.folder, self.processor = json.loads(path.read_text()), path.parent, processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[str, list[Image.Image]]:
        record = self.records[number]
        images = [Image.open(self.folder / name).convert("RGB") for name in record["image"]]
        asked, answered = (turn["value"] for turn in record["conversations"])
        return chat(self.processor, len(images), asked.replace("<image>", ""), answered), images


def chat(processor: Any, images: int, asked: str, answered: str) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": asked}]
    answer = [{"type": "text", "text": answered}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    )


def packed(samples: Any, processor: Any, **settings: Any) -> Iterator[int]:
    pack, filled = [], 0
    for text, images in samples:
        inputs = processor(text=text, images=images, return_tensors="pt", **settings)
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


def alternate(name: str, ways: dict[str, Callable[[], Iterator[int]]], seconds: float) -> None:
    """Prints the rates of all ways, measured in turns, and how many times that of each other the first one is."""
    rounds = np.array([[rate(way, seconds / 3) for way in ways.values()] for _ in range(3)])
    for number, way in enumerate(ways):
        ratios = rounds[:, 0] / rounds[:, number]
        spread = f"{np.median(ratios):8.2f}x ({ratios.min():.2f} to {ratios.max():.2f})" if number else ""
        print(f"{name if not number else '':<22}{way:<24}{np.median(rounds[:, number]):10.1f}{spread}", flush=True)


def in_order(source: Source, processor: Any, data: DataConfig, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and frames of the first samples of a source, each a batch of its own."""
    collator = Collator([source], processor, data, 0)
    for number in range(count):
        batch, bad = collator.batch([PlannedPack(number, (Unit(0, number, 0, 0, -1, *source.index.size(number)),))], 0)
        assert not bad
        yield batch.input_ids.numpy(), batch.images.pixels.numpy()


def verify(
    name: str, source: Source, ours: Any, data: DataConfig, samples: Any, theirs: Any, settings: dict[str, Any]
) -> None:
    """Compares ids and pixels of the first samples; ours end in a token for the end, which theirs have not."""
    most, same = 0, 0
    for (ids, frames), (_, close), (text, images) in zip(
        in_order(source, with_backend(ours, "pil"), data, 8), in_order(source, ours, data, 8), samples
    ):
        found = theirs(text=text, images=images, return_tensors="pt", do_rescale=False, do_normalize=False, **settings)
        expected = found["input_ids"][0].numpy()
        np.testing.assert_array_equal(ids[: len(expected)], expected)
        assert len(ids) <= len(expected) + 1
        pixels = found["pixel_values"][0].numpy().astype(np.int16)
        np.testing.assert_array_equal(frames, pixels)
        most, same = max(most, int(np.abs(close - pixels).max())), same + float((close == pixels).mean()) / 8
    print(
        f"{name}: ids equal, pixels of pil equal; of torch's resampling {same:.2%} are, the others within {most} levels"
    )


def with_backend(processor: Any, backend: str) -> Any:
    changed = copy.copy(processor)
    changed.image_processor = processor.image_processor.replace(backend=backend)
    return changed


def processors(folder: str) -> tuple[Any, Any]:
    """Ours, which resizes as training does, and that of transformers with Pillow, from the same folder."""
    from transformers import AutoProcessor

    ours = tiny_idefics3_processor(f"{folder}/processor", image_size=364, image_seq_len=169, split=True, tiles=2)
    return with_backend(ours, "auto"), AutoProcessor.from_pretrained(f"{folder}/processor", backend="pil")


def decoding(samples: list[list[bytes]]) -> Iterator[int]:
    """Pillow's decoding alone, which both sides do."""
    for images in samples:
        for data in images:
            Image.open(io.BytesIO(data)).convert("RGB")
        yield 1


def measure(form: str, folder: Path, ours: Any, theirs: dict[str, Any], seconds: float, energon: bool) -> None:
    """Prints the rates of the whole path from one kind of file, and of reading from tar."""
    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    patterns = {"tar": "shards/*.tar", "parquet": "parquet/*.parquet", "json": "json/train.json"}
    data = DataConfig(sequence_length=TOKENS, images_per_pack=64, long_documents="drop")
    config = SourceConfig(path=str(folder / patterns[form]), format="auto")
    [source] = build_sources({"photos": config}, data, ours)
    stored = [source.stored_images(number) for number in range(32)]
    plain = lambda: webdataset.WebDataset(shards, shardshuffle=False)
    files = sorted(map(str, folder.glob("parquet/*.parquet")))
    texts: dict[str, Callable[[Any], Any]] = {
        "tar": lambda processor: map(document_of, plain()),
        "parquet": lambda processor: rows_of(files, processor),
        "json": lambda processor: (lambda records: map(records.__getitem__, range(len(records))))(
            Records(folder / "json" / "train.json", processor)
        ),
    }
    first = next(iter(theirs.values()))
    settings = {} if form == "tar" else {"add_special_tokens": False}  # the chat template writes them
    verify(form, source, ours, data, texts[form](first), first, settings)
    pil = with_backend(ours, "pil")
    ways = {"m4train": lambda: path_ours(source, ours, data), "m4train pil": lambda: path_ours(source, pil, data)}
    for name, processor in theirs.items():
        ways[name] = lambda processor=processor: packed(texts[form](processor), processor, **settings)
        unscaled = {"do_rescale": False, "do_normalize": False, **settings}
        ways[f"{name} uint8"] = lambda processor=processor, given=unscaled: packed(
            texts[form](processor), processor, **given
        )
    if form == "tar":
        read = {"m4train": lambda: read_ours(source), "webdataset": lambda: read_theirs(shards)}
        if energon and importlib.util.find_spec("megatron") is not None:
            samples = energon_samples(folder / "shards")
            read["energon"] = lambda: read_energon(samples)
            ways["energon"] = lambda: path_theirs(samples, first)
        alternate("read", read, seconds)
    alternate(f"whole path, {form}", ways | {"decoding alone": lambda: decoding(stored)}, seconds)


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=8.0, help="per measurement")
    parser.add_argument("--formats", nargs="*", default=["tar", "parquet", "json"])
    parser.add_argument("--quick", action="store_true", help="few samples, a second each, Energon left out")
    parser.add_argument("--index", type=int, help="only measure an index of this many samples, such as 10000000")
    options = parser.parse_args(arguments)
    if options.index:
        with tempfile.TemporaryDirectory() as folder:
            large_index(Path(folder), options.index)
        return
    if options.quick:
        options.samples, options.seconds = 48, 1.0
    torch.set_num_threads(1)
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_samples(folder / "shards", options.samples)
        parquet_of(folder / "shards", folder / "parquet")
        json_of(folder / "shards", folder / "json")
        ours, plain = processors(name)
        theirs = {"transformers": plain}
        if importlib.util.find_spec("torchvision") is not None:
            theirs["torchvision"] = AutoProcessor.from_pretrained(f"{folder}/processor", backend="torchvision")
        print("samples a second of one core, and how many times those of the others m4train does:")
        for form in options.formats:
            measure(form, folder, ours, theirs, options.seconds, not options.quick)
        if options.quick:
            return
        print(f"{'plan':<12} {planning(folder / 'index'):10.3f} s for a step of 10,000 documents")


if __name__ == "__main__":
    main()
