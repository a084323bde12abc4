"""Samples per second of one core that an index is built with, for tar shards, parquet and JSON, and how that grows with the samples.

    PYTHONPATH=. python benchmarks/indexing.py [--formats tar parquet json] [--samples 10000 100000 1000000] [--profile]

Samples have about 200 words and one or two JPEG pictures of 16 x 12, so that headers, texts and rows count, not bytes. Times are
processor time of one process, from nothing to the index on disk; "memory" is what the process grew by at its largest. `--profile`
says where the time goes, by the functions that are called from the scan.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.documents.rendering import Renderer
from m4train.data.index.build import build_index
from m4train.data.shards import ShardWriter, expand_shards
from m4train.data.sources.registry import shard_format
from tests.helpers.processing import tiny_idefics3_processor

TEXT = "river hill cloud. Stone path tree light, water house window people walking under green sky"
WORDS = TEXT.split()
PARTS = {  # functions, by what they do
    "tokenising": ("tokenizer.py:plain_ids", "tokenizer.py:encode_plain"),
    "chat template": ("chat.py:split",),
    "places for cuts": ("boundaries.py:places",),
    "headers of pictures": ("images.py:read_image_info", "images.py:frames_in"),
    "records": ("records.py:compose", "tar.py:resolve", "tar.py:compose", "records.py:unread", "json_records.py:parse"),
    "tar headers": ("tarfiles.py:_walk",),
    "reading": ("files.py:read", "files.py:whole", "parquet.py:_group", "parquet.py:_row"),
}


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(16):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(buffer, "jpeg")
        made.append(buffer.getvalue())
    return made


def write(form: str, folder: Path, samples: int) -> str:
    """Writes so many samples and says where."""
    rng, images = np.random.default_rng(0), pictures()
    texts = [" ".join(rng.choice(WORDS, rng.integers(40, 160))) for _ in range(97)]
    if form == "tar":
        with ShardWriter(folder, max_samples=10_000) as writer:
            for n in range(samples):
                items = [{"text": texts[n % 97]}, {"image": "0.jpg"}, {"text": texts[(n + 1) % 97]}, {"image": "1.jpg"}]
                writer.write(f"{n:07d}", {"items": items}, {"0.jpg": images[n % 16], "1.jpg": images[(n + 3) % 16]})
        return str(folder / "*.tar")
    turns = lambda n: (texts[n % 97], texts[(n + 1) % 97])
    if form == "json":
        (folder / "pictures").mkdir()
        for n in range(min(samples, 1000)):
            (folder / "pictures" / f"{n}.jpg").write_bytes(images[n % 16])
        with open(folder / "train.jsonl", "w") as file:
            for n in range(samples):
                asked, answered = turns(n)
                said = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answered}]
                file.write(json.dumps({"id": n, "image": f"pictures/{n % 1000}.jpg", "conversations": said}) + "\n")
        return str(folder / "train.jsonl")
    import pyarrow
    import pyarrow.parquet

    for start in range(0, samples, 10_000):
        rows = []
        for n in range(start, min(samples, start + 10_000)):
            asked, answered = turns(n)
            rows.append({"images": [{"bytes": images[n % 16]}], "texts": [{"user": asked, "assistant": answered}]})
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"{start:08d}.parquet", row_group_size=1000)
    return str(folder / "*.parquet")


def built(form: str, path: str, samples: int, profile: bool) -> None:
    """Builds the index of `path` and prints what it took."""
    processor = tiny_idefics3_processor(image_size=364, image_seq_len=169, split=True, tiles=2)
    config = SourceConfig(path=path, format={"tar": "canonical"}.get(form, form))
    kind, shards, renderer = shard_format(config), expand_shards(path, config.format), Renderer(processor, config)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    seen = sampled() if profile else Counter()
    build_index(shards, kind, renderer, None, workers=1)
    signal.setitimer(signal.ITIMER_PROF, 0)
    taken = time.process_time() - begun
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{form:<10}{samples:>10,}{samples / taken:>10.0f}/s{1e6 * taken / samples:>8.0f} us{memory:>8.0f} MiB",
        flush=True,
    )
    if profile:
        print("  " + ", ".join(f"{part} {count / seen.total():.0%}" for part, count in seen.most_common()), flush=True)


def sampled() -> Counter[str]:
    """Counts, every millisecond of processor time from now on, which of PARTS is at work; unlike cProfile it slows none of them."""
    of = {function: part for part, functions in PARTS.items() for function in functions}
    seen: Counter[str] = Counter()

    def look(_: int, frame: Any) -> None:
        while frame is not None:
            part = of.get(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
            if part is not None:
                seen[part] += 1
                return
            frame = frame.f_back
        seen["the rest"] += 1

    signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="*", default=["tar", "parquet", "json"])
    parser.add_argument("--samples", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")  # a process for each, whose memory is its own
    for form in options.formats:
        for samples in options.samples:
            with tempfile.TemporaryDirectory() as folder:
                path = write(form, Path(folder), samples)
                process = context.Process(target=built, args=(form, path, samples, options.profile))
                process.start()
                process.join()


if __name__ == "__main__":
    main()
