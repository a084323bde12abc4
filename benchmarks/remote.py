"""Samples per second out of an object store that answers after 50 ms, next to the same shards on the local disk and to webdataset
streaming them; and the requests that each takes.

    PYTHONPATH=. python benchmarks/remote.py [--latency 0.05] [--samples 400] [--workers 1 2] [--rounds 3] [--formats tar parquet]

The store is an HTTP server on loopback that honours ranges, in a process of its own; it sleeps before every answer. Samples are those
of benchmarks/data.py, read, decoded, tokenised and packed by the data workers of a run, in the shuffled order of a run; webdataset
(`pipe:curl`) streams whole shards in stored order to as many workers, which decode with Pillow and encode with transformers. Times
are those of a clock, in turns: a machine with other work slows all of them alike.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.data import TOKENS, parquet_of, path_theirs, processors, write_samples
from m4train.config import DataConfig, SourceConfig
from m4train.data.loading import loader as loading
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.data.source import Source, build_sources
from tests.helpers.stores import HttpStore, http_store


def serve(folder: str, latency: float, line: Connection) -> None:
    """The store: tells its address, then for every word received how many requests and bytes there were since the last one."""
    with http_store(Path(folder)) as store:
        store.latency = latency
        line.send(store.url)
        while line.recv():
            line.send(counted(store))


def counted(store: HttpStore) -> tuple[int, int]:
    found = len(store.asked), sum(size for _, _, size in store.ranges)
    store.asked.clear()
    store.ranges.clear()
    return found


@contextmanager
def object_store(folder: Path, latency: float) -> Iterator[tuple[str, Callable[[], tuple[int, int]]]]:
    """The URL of a store that serves `folder`, and what tells the requests and bytes since it was last asked."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(str(folder), latency, there), daemon=True)
    process.start()
    url = here.recv()

    def count() -> tuple[int, int]:
        here.send("count")
        return here.recv()

    yield url, count
    process.kill()


def opened(path: str, folder: Path, processor: Any, **changes: Any) -> tuple[Source, DataConfig]:
    data = DataConfig(
        sequence_length=TOKENS // 2,
        images_per_pack=64,
        long_documents="drop",
        index_dir=str(folder / "index"),
        **changes,
    )
    [source] = build_sources({"photos": SourceConfig(path=path, format="auto")}, data, processor)
    return source, data


def run_of(source: Source, data: DataConfig, processor: Any) -> Iterator[int]:
    """The number of samples in each step of a run without a model."""
    for step in Loader(Plan([source], data, 0, 2), processor, data, seed=0, micro_batch_size=1):
        yield step.documents


class Streamed(torch.utils.data.IterableDataset):
    """What webdataset makes of the shards, packed by neighbours; the processor is loaded where it is used."""

    def __init__(self, shards: list[str], folder: str) -> None:
        self.shards, self.folder = shards, folder

    def __iter__(self) -> Iterator[int]:
        torch.set_num_threads(1)
        _, theirs = processors(self.folder)
        while True:
            dataset = webdataset.WebDataset(self.shards, shardshuffle=False, workersplitter=webdataset.split_by_worker)
            yield from path_theirs(dataset, theirs)


def streamed(shards: list[str], folder: str, workers: int) -> Iterator[int]:
    pipes = [f"pipe:curl -s {shard}" for shard in shards]
    yield from torch.utils.data.DataLoader(Streamed(pipes, folder), batch_size=None, num_workers=workers)


def measured(way: Iterator[int], samples: int, count: Callable[[], tuple[int, int]]) -> tuple[float, float, float]:
    """Samples a second of a clock, requests a sample and bytes a sample, after the first tenth of `samples`."""
    done = 0
    while done < samples / 10:
        done += next(way)
    count()
    done, begun = 0, time.perf_counter()
    while done < samples:
        done += next(way)
    seconds = time.perf_counter() - begun
    requests, size = count()
    return done / seconds, requests / done, size / done


def compare(ways: dict[str, Callable[[], Iterator[int]]], options: Any, count: Callable[[], tuple[int, int]]) -> None:
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            found[name].append(measured(way(), options.measured, count))
    local = np.array([rate for rate, _, _ in found["local"]])
    for name, rows in found.items():
        rate, requests, size = np.median(np.array(rows), axis=0)
        ratio = np.median(np.array([row[0] for row in rows]) / local)
        print(f"  {name:<34}{rate:8.1f}{ratio:8.2f}{requests:12.2f}{size / 1000:12.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before every answer")
    parser.add_argument("--samples", type=int, default=400, help="in the shards")
    parser.add_argument("--measured", type=int, default=150, help="samples of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--formats", nargs="*", default=["tar", "parquet"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_samples(folder / "shards", options.samples)
        parquet_of(folder / "shards", folder / "shards", rows=20)
        ours, _ = processors(name)
        with object_store(folder / "shards", options.latency) as (url, count):
            print(f"{'':<36}samples/s  of local  requests/sample  kB/sample")
            for form in options.formats:
                for workers in options.workers:
                    print(f"{form}, {workers} workers", flush=True)
                    compare(ways_of(form, workers, folder, url, ours), options, count)


def ways_of(form: str, workers: int, folder: Path, url: str, processor: Any) -> dict[str, Callable[[], Iterator[int]]]:
    """What is measured in turns with so many workers."""
    local = opened(str(folder / "shards" / f"*.{form}"), folder, processor, num_workers=workers)
    remote = opened(f"{url}/*.{form}", folder, processor, num_workers=workers)
    ways = {"local": lambda: run_of(*local, processor), "store": lambda: run_of(*remote, processor)}
    ways["store, nothing read ahead"] = lambda: without_read_ahead(run_of(*remote, processor))
    if form == "tar":
        shards = sorted(f"{url}/{path.name}" for path in (folder / "shards").glob("*.tar"))
        ways["webdataset, curl"] = lambda: streamed(shards, str(folder), workers)
    return ways


def without_read_ahead(way: Iterator[int]) -> Iterator[int]:
    before = loading._READ_AHEAD, loading._SAMPLES_AHEAD
    loading._READ_AHEAD = loading._SAMPLES_AHEAD = 0
    try:
        yield from way
    finally:
        loading._READ_AHEAD, loading._SAMPLES_AHEAD = before


if __name__ == "__main__":
    main()
