"""What went in and out of every step, what was dropped and why. Numbers of ranks add up, in whatever attempt each was done."""

from __future__ import annotations

import bisect
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.frame.document import images_of

if TYPE_CHECKING:
    from datatrove.data import Document

EXAMPLES = 5  # of every label, kept a rank and after merging
_CHARACTERS = 2000  # of the texts of an example
SIZES = ("documents", "images", "words", "characters")


@dataclass
class Ledger:
    """The statistics of one step: of a rank, or merged."""

    name: str
    before: Counter[str] = field(default_factory=Counter)  # documents, images, words (between white space), characters
    after: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)  # label, such as a filter's name -> how often
    lost: dict[str, Counter[str]] = field(default_factory=dict)  # label -> documents, images and words that went for it
    # label -> id, url, nodes, media (paths relative to the folder of the stage) and why of what it was counted for
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> edges, counts, thresholds

    def add(self, other: Ledger) -> None:
        """Adds the numbers of another rank. Raises ValueError if its histograms have other edges."""
        for mine, theirs in ((self.before, other.before), (self.after, other.after), (self.counts, other.counts)):
            mine.update(theirs)
        for label, sizes in other.lost.items():
            self.lost.setdefault(label, Counter()).update(sizes)
        for label, examples in other.examples.items():
            kept = self.examples.setdefault(label, [])
            kept.extend(examples[: EXAMPLES - len(kept)])
        for name, theirs_of in other.histograms.items():
            histogram = self.histograms.setdefault(name, {**theirs_of, "counts": [0] * len(theirs_of["counts"])})
            if histogram["edges"] != theirs_of["edges"]:
                raise ValueError(f"histogram {name} of {self.name} has other edges on another rank")
            histogram["counts"] = [sum(pair) for pair in zip(histogram["counts"], theirs_of["counts"])]

    def measure(self, name: str, value: float, edges: Sequence[float], thresholds: Iterable[float] = ()) -> None:
        """Counts a value in a histogram whose bins are below edges[0], between two edges, and from the last on."""
        histogram = self.histograms.get(name)
        if histogram is None:
            counts = [0] * (len(edges) + 1)
            histogram = {"edges": list(edges), "counts": counts, "thresholds": list(thresholds)}
            self.histograms[name] = histogram
        histogram["counts"][bisect.bisect_right(edges, value)] += 1

    def example(self, label: str, document: Document, why: dict[str, Any]) -> None:
        """Keeps the document as an example of `label`, as long as there are few."""
        kept = self.examples.setdefault(label, [])
        if len(kept) < EXAMPLES:
            kept.append(_example(document) | why)

    def to_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """The ledger as JSON; paths of its examples become relative to `folder`."""
        for media in (media for label in self.examples.values() for example in label for media in example["media"]):
            media["path"] = os.path.relpath(media["path"], folder) if folder else media["path"]
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ledger:
        counters = {name: Counter(values[name]) for name in ("before", "after", "counts")}
        lost = {label: Counter(sizes) for label, sizes in values.get("lost", {}).items()}
        return cls(values["name"], **counters, lost=lost, examples=values["examples"], histograms=values["histograms"])


def size_of(document: Document) -> dict[str, int]:
    """What one document adds to a funnel. Before `extract` it has no images and words, only the characters of its HTML."""
    sizes = {"documents": 1, "characters": len(document.text)}
    if "nodes" not in document.metadata:
        return sizes
    text = document.text
    words = words_in(text) if text.strip() else 0
    return sizes | {"images": sum(1 for _ in images_of(document)), "words": words}


def words_in(text: str) -> int:
    """Words, counted by the white space that `extract` leaves, so that those of paragraphs add up to those of their document."""
    return text.count(" ") + text.count("\n") + 1 - text.count("\n\n")


def merged(folder: Path) -> list[Ledger]:
    """The statistics of a stage: those of all its ranks that are done, step by step."""
    steps: dict[str, Ledger] = {}
    for path in sorted((folder / "statistics").glob("*.json")):
        for values in json.loads(path.read_text(encoding="utf-8")):
            ledger = Ledger.from_dict(values)
            steps.setdefault(ledger.name, Ledger(ledger.name)).add(ledger)
    return list(steps.values())


def _example(document: Document) -> dict[str, Any]:
    left = _CHARACTERS
    nodes = []
    for node in document.metadata.get("nodes") or [{"type": "text", "text": document.text}]:
        if node["type"] == "text":
            node, left = {"type": "text", "text": node["text"][:left]}, left - len(node["text"])
        nodes.append(dict(node))
        if left <= 0:
            break
    media = [
        {"id": media.id, "path": media.path, "offset": media.offset, "length": media.length}
        for media in document.media
        if media.path
    ]
    return {"id": document.id, "url": document.metadata.get("url", ""), "nodes": nodes, "media": media}
