"""A source of very many shards under a small limit of open files: how long a plan takes, and what it holds.

    python benchmarks/many_shards.py [shards=100000] [descriptors=64]

The shards are links to a few real ones, with their indexes. The first run makes the catalogue, the second finds it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ORIGINALS, SAMPLES = 8, 10


def measured(pattern: str, descriptors: int) -> None:
    """Runs in a process of its own: opens the source, plans, builds a batch, prints what that took."""
    import resource

    import psutil

    from m4train.config import SourceConfig
    from m4train.data.loading.collate import Collator
    from m4train.data.plan.plan import Plan
    from m4train.data.source import build_sources
    from tests.helpers.data import FakeProcessor, data_config

    process, data = psutil.Process(), data_config(packing_pool=128)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    before, begun = process.memory_info().rss, time.perf_counter()
    sources = build_sources({"s": SourceConfig(path=pattern)}, data, FakeProcessor())
    opened = time.perf_counter() - begun
    steps = Plan(sources, data, 0, 256).steps()
    first = next(steps)
    planned = time.perf_counter() - begun
    for _, step in zip(range(20), steps):
        assert len(step.packs) == 256
    Collator(sources, FakeProcessor(), data, 0).batch(first.packs[:8], 1)
    maps = sum(
        ".index" in line or ".tokens" in line or ".catalogue" in line
        for line in Path("/proc/self/maps").read_text().splitlines()
    )
    report = {
        "shards": len(sources[0].index.shards),
        "samples": len(sources[0]),
        "open_s": round(opened, 2),
        "first_step_s": round(planned, 2),
        "twenty_more_steps_s": round(time.perf_counter() - begun - planned, 2),
        "mappings": maps,
        "descriptors": process.num_fds(),
        "memory_mib": round((process.memory_info().rss - before) / 2**20, 1),
    }
    print(json.dumps(report))


def main(shards: int, descriptors: int) -> None:
    from m4train.config import SourceConfig
    from m4train.data.source import build_sources
    from tests.helpers.data import FakeProcessor, data_config, documents, write_shards

    folder = Path(tempfile.mkdtemp(prefix="many_shards_"))
    try:
        made = write_shards(folder / "originals", list(documents(ORIGINALS * SAMPLES)), max_samples=SAMPLES)
        pattern = str(folder / "originals" / "*.tar")
        build_sources({"s": SourceConfig(path=pattern)}, data_config(), FakeProcessor())
        (folder / "many").mkdir()
        for number in range(shards):
            original = made[number % len(made)]
            for file in original.parent.glob(f"{original.name}*"):
                os.link(file, folder / "many" / f"{number:07d}{file.name.removeprefix(original.stem)}")
        command = [sys.executable, __file__, "measured", str(folder / "many" / "*.tar"), str(descriptors)]
        for run in ("catalogue made", "catalogue there"):
            print(
                f"{run}: {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measured"]:
        measured(sys.argv[2], int(sys.argv[3]))
    else:
        given = dict(argument.split("=") for argument in sys.argv[1:])
        main(int(given.get("shards", 100_000)), int(given.get("descriptors", 64)))
