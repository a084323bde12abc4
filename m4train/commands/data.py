"""What `m4train data` does with the sources of a configuration: index, stats, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from m4train import build
from m4train.config import Config
from m4train.data.convert import QUARANTINE
from m4train.data.convert import convert as convert_source
from m4train.data.source import build_sources, index_sources, open_sources, source_stats


def index(config: Config) -> int:
    """Builds what is missing or stale of the indexes of all sources; an interrupted build goes on."""
    processor = build.prepared_processor(config)
    with _progress("shards") as progress:
        for name, source in build.all_sources(config.data).items():
            index_sources({name: source}, config.data, processor, _task(progress, name))
    open_sources(
        build.all_sources(config.data), config.data, processor
    )  # says what is bad, and which fields are not read
    return 0


def stats(config: Config) -> int:
    """Prints what every source holds, as JSON, from the indexes alone."""
    sources = open_sources(build.all_sources(config.data), config.data, build.prepared_processor(config))
    print(json.dumps({source.name: source_stats(source) for source in sources}, indent=1))
    return 0


def convert(config: Config, folder: Path, workers: int) -> int:
    """Writes all sources as canonical shards into `folder`, and prints the counts as JSON."""
    counts: dict[str, Any] = {}
    with _progress("samples") as progress:
        for source in build_sources(build.all_sources(config.data), config.data, build.prepared_processor(config)):
            report = _task(progress, source.name)
            counts[source.name] = convert_source(source, folder, workers=workers, progress=report)
    print(json.dumps(counts, indent=1))
    left_out = sum(sum(found.values()) - found.get("written", 0) for found in counts.values())
    if left_out:
        Console(stderr=True).print(f"{left_out} samples were left out: see {folder / QUARANTINE}")
    return 0


def _progress(unit: str) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _task(progress: Progress, name: str) -> Any:
    task = progress.add_task(name, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)
