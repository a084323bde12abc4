"""`seal`: one `dataset.json` of what all ranks of `write` wrote, after every shard was read again and compared with its hash."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document

from data_pipelines.corpus.write import PROVENANCE, SHARDS, WRITTEN, sha256_of
from data_pipelines.frame.manifest import MANIFEST
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import write_json
from m4train.errors import ConfigError, DataError

DATASET = "dataset.json"


class Seal(Step):
    """Writes `dataset.json` next to the shards of the stage `stage`: a stage of its own, of one task."""

    name = "seal"

    def __init__(self, stage: str = "write") -> None:
        super().__init__()
        self.stage = stage

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        if world_size != 1:
            raise ConfigError(f"seal runs once, but its stage has {world_size} tasks: set its tasks to 1.")
        self.folder()
        assert self.place is not None
        folder = self.place.of_stage(self.stage)
        found = dataset_of(folder)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found |= {"configuration": manifest["configuration"], "inputs": manifest["reads"], "code": manifest["code"]}
        write_json(folder / DATASET, found)
        self.count("shards", len(found["shards"]))
        self.count("samples", sum(counts["samples"] for counts in found["counts"].values()))
        yield from ()


def dataset_of(folder: Path) -> dict[str, Any]:
    """Counts by split, licences, and the hash of every file. Raises DataError for a shard that is not what was written."""
    counts: dict[str, Counter[str]] = {}
    licenses: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    for path in sorted((folder / WRITTEN).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        licenses.update(record["licenses"])
        shards += record["shards"]
        for split, found in record["counts"].items():
            counts.setdefault(split, Counter(samples=0)).update(found)
    for shard in shards:
        path = folder / SHARDS / shard["name"]
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            raise DataError(f"{path} is not what was written: remove {folder}, and run the pipeline again.")
    files = sorted((folder / PROVENANCE).glob("*.jsonl.gz"))
    return {
        "counts": {split: dict(sorted(found.items())) for split, found in counts.items()},
        "licenses": dict(sorted(licenses.items())),
        "shards": shards,
        "provenance": [{"name": path.name, "sha256": sha256_of(path)} for path in files],
    }
