"""One rank of a stage: its share of the documents through all steps, and the files that say how it went.

In the folder of the stage: `ranks/completions/00000` (datatrove's marker), `failures/00000.json`, `statistics/00000.json`.
"""

from __future__ import annotations

import json
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipelines.frame.options import build_step
from data_pipelines.frame.step import Place, Step
from data_pipelines.frame.store import read_documents, write_documents, write_json
from m4train.errors import DataError, without_secrets

RANKS = "ranks"  # datatrove's folder of a stage: markers, logs, what it launched


@dataclass(frozen=True)
class Stage:
    """A stage as its ranks see it: only names and numbers, for it travels to other machines."""

    root: Path
    name: str
    steps: dict[str, dict[str, Any]]
    tasks: int
    reads: Path | None  # folder of documents
    keep: bool

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def build(self) -> list[Step]:
        steps = [build_step(key, options) for key, options in self.steps.items()]
        for step in steps:
            step.place = Place(self.root, self.name)
        return steps

    def missing(self) -> list[int]:
        """The ranks that are not done."""
        return missing_ranks(self.folder, self.tasks)

    def failures(self) -> dict[int, str]:
        """What the ranks that failed in their last attempt say, in one line each."""
        found = {}
        for path in sorted((self.folder / "failures").glob("*.json")):
            found[int(path.stem)] = str(json.loads(path.read_text(encoding="utf-8"))["error"])
        return found


def missing_ranks(folder: Path, tasks: int) -> list[int]:
    done = folder / RANKS / "completions"
    return [rank for rank in range(tasks) if not (done / f"{rank:05d}").exists()]


def failure_path(folder: Path, rank: int) -> Path:
    return folder / "failures" / f"{rank:05d}.json"


def record_failure(folder: Path, rank: int, error: str, trace: str = "") -> None:
    """Leaves word of why a rank failed."""
    write_json(failure_path(folder, rank), {"error": without_secrets(error), "traceback": without_secrets(trace)})


class RankRun(PipelineStep):
    """What datatrove runs: all steps of a stage on one rank. An error is recorded, so that it does not end the other ranks."""

    name = "rank"
    type = "m4train"

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        failure_path(self.stage.folder, rank).unlink(missing_ok=True)
        try:
            self._work(rank)
        except Exception as error:
            record_failure(self.stage.folder, rank, f"{type(error).__name__}: {error}", traceback.format_exc())
        yield from ()

    def _work(self, rank: int) -> None:
        stage, begun = self.stage, time.monotonic()
        self._check_upstream()
        steps = stage.build()
        documents: Iterable[Document] | None = None
        if stage.reads is not None:
            documents = read_documents(stage.reads, rank, stage.tasks)
        for step in steps:
            documents = step.run(documents, rank, stage.tasks)
        if stage.keep:
            write_documents(documents or (), stage.folder, rank)
        else:
            deque(documents or (), maxlen=0)
        write_json(
            stage.folder / "statistics" / f"{rank:05d}.json", [step.ledger.to_dict(stage.folder) for step in steps]
        )
        write_json(stage.folder / "seconds" / f"{rank:05d}.json", round(time.monotonic() - begun, 3))

    def _check_upstream(self) -> None:
        """Raises DataError if the stage that writes the documents is not done: some of them would be left out unseen."""
        reads = self.stage.reads
        manifest = reads / "manifest.json" if reads else None
        if reads is None or manifest is None or not manifest.is_file():
            return
        missing = missing_ranks(reads, json.loads(manifest.read_text(encoding="utf-8"))["tasks"])
        if missing:
            raise DataError(
                f"{reads} lacks the documents of {len(missing)} ranks (first {missing[0]}): finish that stage first."
            )
