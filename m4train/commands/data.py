"""What `m4train data` does with the sources of a configuration: index, stats, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.progress import Progress

from m4train import build
from m4train.config import Config
from m4train.data.convert import QUARANTINE
from m4train.data.convert import convert as convert_source
from m4train.data.plan.left_out import above_limit, left_out, left_out_lines
from m4train.data.source import build_sources, index_sources, open_sources, source_stats
from m4train.terminal import console, progress


def index(config: Config) -> int:
    """Builds what is missing or stale of the indexes of all sources; an interrupted build goes on."""
    processor = build.prepared_processor(config)
    with progress("shards") as bars:
        for name, source in build.all_sources(config.data).items():
            index_sources({name: source}, config.data, processor, _task(bars, name))
    # Says which fields are not read.
    sources = open_sources(build.all_sources(config.data), config.data, processor, indexed=True)
    found = [left_out(source, config.data) for source in sources]
    stops = above_limit(found, config.data)
    for line in [*left_out_lines(found), *([f"a run would stop before training: {stops}"] if stops else [])]:
        print(line)
    return 0


def stats(config: Config) -> int:
    """Prints what every source holds, as JSON, from the indexes alone."""
    sources = open_sources(build.all_sources(config.data), config.data, build.prepared_processor(config))
    print(json.dumps({source.name: source_stats(source) for source in sources}, indent=1))
    return 0


def convert(config: Config, folder: str, workers: int) -> int:
    """Writes all sources as canonical shards into `folder`, and prints the counts as JSON."""
    counts: dict[str, Any] = {}
    with progress("samples") as bars:
        for source in build_sources(build.all_sources(config.data), config.data, build.prepared_processor(config)):
            report = _task(bars, source.name)
            counts[source.name] = convert_source(source, Path(folder), workers=workers, progress=report)
    print(json.dumps(counts, indent=1))
    left_out = sum(sum(found.values()) - found.get("written", 0) for found in counts.values())
    if left_out:
        console(stderr=True).print(f"{left_out} samples were left out: see {Path(folder) / QUARANTINE}")
    return 0


def _task(bars: Progress, name: str) -> Any:
    task = bars.add_task(name, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)
