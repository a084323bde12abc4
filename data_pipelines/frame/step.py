"""The base of every step: an iterator of documents in, an iterator of documents out, with the numbers of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipelines.frame.statistics import Ledger, size_of, words_in
from m4train.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a step works."""

    root: Path  # folder of the pipeline
    stage: str  # name of the stage

    @property
    def folder(self) -> Path:
        """Folder of the stage, shared by its ranks: files in it are named by rank, and written by `store.aside`."""
        return self.root / self.stage

    def of_stage(self, name: str) -> Path:
        """The folder of an earlier stage. Raises ConfigError if there is no such folder."""
        folder = self.root / name
        if not folder.is_dir():
            raise ConfigError(f"stage {self.stage} needs what stage {name} writes, but {folder} does not exist.")
        return folder


class Step(PipelineStep):
    """One step of a pipeline. A subclass has keyword arguments with annotations and defaults, which are the keys that a
    configuration may set; it checks them in `__init__`, and does its work in `process`.

    `process` is called once a rank. A step that begins a pipeline gets no documents and makes its own, of its share of
    `inputs()`. Each can be used alone: `list(SomeStep(...).run(documents))`.
    """

    type = "m4train"
    name = ""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.name or type(self).__name__)
        self.place: Place | None = None  # set by the runner

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        raise NotImplementedError

    def inputs(self) -> list[tuple[str, int]]:
        """Names and sizes in bytes of the files that the step reads from outside of the pipeline, on all ranks."""
        return []

    def run(self, data: Iterable[Document] | None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents that come out, with what goes in and out counted in `ledger`."""
        for document in self.process(self._counted(data or ()), rank, world_size):
            self.ledger.after.update(size_of(document))
            yield document

    def _counted(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.ledger.before.update(size_of(document))
            yield document

    def count(self, label: str, number: int = 1, example: Document | None = None, **why: Any) -> None:
        """Counts something, such as a document that a filter dropped; `example` is kept with `why` while there are few."""
        self.ledger.counts[label] += number
        if example is not None:
            self.ledger.example(label, example, why)

    def lose(self, label: str, lost: Document | str | None) -> None:
        """Counts by size what goes for the reason `label`: a document, paragraphs of one, or, None, an image."""
        sizes = {"images": 1} if lost is None else {"words": words_in(lost)} if isinstance(lost, str) else size_of(lost)
        self.ledger.lost.setdefault(label, Counter()).update(sizes)

    def measure(self, name: str, value: float, edges: Sequence[float], thresholds: Iterable[float] = ()) -> None:
        """Counts a value in the histogram `name`; edges and thresholds are those of the first call."""
        self.ledger.measure(name, value, edges, thresholds)

    def folder(self) -> Path:
        """The folder of the stage. Raises ConfigError outside of a pipeline."""
        if self.place is None:
            raise ConfigError(
                f"step {self.name} writes files, so it needs a place: set step.place, or run it in a pipeline."
            )
        return self.place.folder
