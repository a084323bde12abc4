"""Deduplication in three stages: `keys` writes the keys of every document, `buckets` compares those of a bucket, `dedup` removes.

Each is resumable by rank, and none holds more than a bounded part of the corpus. `keys` and `dedup` must be given the same
documents in the same number of tasks, which `dedup` checks.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from data_pipelines.corpus.buckets import (
    KeyWriter,
    Listed,
    group_starts,
    key_hash,
    merged_groups,
    place_of,
    places_listed,
    save,
)
from data_pipelines.corpus.dedup_rules import DedupRules, image_keys, newest_first, paragraph_keys
from data_pipelines.frame.document import BETWEEN_TEXTS, Node, nodes_of, set_nodes, text_node
from data_pipelines.frame.step import Step
from m4train.errors import ConfigError, DataError


class DedupKeys(Step):
    """Writes the keys of every document under `rules` into `buckets` buckets, and passes the documents on."""

    name = "keys"

    def __init__(self, rules: dict[str, Any], buckets: int = 16) -> None:
        super().__init__()
        self.rules, self.buckets = DedupRules.of(rules), _checked(buckets)

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        folder = self.folder()
        writers = {
            rule: KeyWriter(folder / "keys" / rule, rank, self.buckets, kind) for rule, kind in self.rules.kinds.items()
        }
        identities = array("Q")  # 8 bytes a document
        for number, document in enumerate(documents):
            identities.append(key_hash(document.id))
            order = newest_first(document)
            for rule, writer in writers.items():
                chooses = rule in self.rules.choosing
                for key in self.rules.keys(rule, document):
                    writer.add(*((key, order, place_of(rank, number)) if chooses else (key,)))
            yield document
        for writer in writers.values():
            writer.flush()
        save(folder / "keys" / f"documents-{rank:05d}.npy", np.frombuffer(identities, np.uint64))


class DedupBuckets(Step):
    """Compares the keys of the stage `keys`, every rank those of its buckets; a stage of its own that reads no documents."""

    name = "buckets"

    def __init__(self, rules: dict[str, Any], buckets: int = 16, keys: str = "keys") -> None:
        super().__init__()
        self.rules, self.buckets, self.keys = DedupRules.of(rules), _checked(buckets), keys

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        folder = self.folder() / "found"
        assert self.place is not None
        source = self.place.of_stage(self.keys) / "keys"
        for rule, kind in self.rules.kinds.items():
            for bucket in range(rank, self.buckets, world_size):
                groups = merged_groups(sorted((source / rule / f"{bucket:04d}").glob("*.npy")), kind)
                parts = [self._found(rule, entries) for entries in groups]
                found = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
                save(folder / rule / f"{bucket:04d}.npy", np.unique(found))
                self.count(f"{rule} listed", len(found))
        yield from ()

    def _found(self, rule: str, entries: np.ndarray) -> np.ndarray:
        """Of a choosing rule the places of all documents of a key but the preferred one; of a counting rule the keys that occur
        too often."""
        starts = group_starts(entries["key"])
        sizes = np.diff(np.append(starts, len(entries)))
        if rule in self.rules.choosing:
            dropped = np.ones(len(entries), bool)
            dropped[starts] = False
            first = np.repeat(entries["place"][starts], sizes)
            return entries["place"][dropped & (entries["place"] != first)]  # a document may have a key twice
        return entries["key"][starts[sizes > self.rules.counts[rule]]]


class Dedup(Step):
    """Drops the documents, images and paragraphs that the stage `found` lists."""

    name = "dedup"

    def __init__(self, rules: dict[str, Any], buckets: int = 16, keys: str = "keys", found: str = "buckets") -> None:
        super().__init__()
        self.rules, self.buckets, self.keys, self.found = DedupRules.of(rules), _checked(buckets), keys, found

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        self.folder()
        assert self.place is not None
        folder = self.place.of_stage(self.found) / "found"
        identities = self._identities(self.place.of_stage(self.keys) / "keys", rank)
        dropped = {rule: places_listed(folder / rule, self.buckets, rank) for rule in self.rules.choosing}
        listed = {rule: Listed(folder / rule, self.buckets) for rule in self.rules.counts}
        number = -1
        for number, document in enumerate(documents):
            if number >= len(identities) or key_hash(document.id) != int(identities[number]):
                raise DataError(self._other(rank, f"document {number} is {document.id}, which it was not"))
            failed = next((rule for rule, numbers in dropped.items() if number in numbers), None)
            if failed is not None:
                self.count(failed, example=document)
                self.lose(failed, document)
            elif self._clean(document, listed):
                self.count("kept", example=document)
                yield document
        if number + 1 != len(identities):
            raise DataError(self._other(rank, f"there are {number + 1} documents instead of {len(identities)}"))

    def _identities(self, folder: Path, rank: int) -> np.ndarray:
        path = folder / f"documents-{rank:05d}.npy"
        if not path.is_file():
            raise DataError(self._other(rank, f"{path} does not exist"))
        return np.load(path, mmap_mode="r")

    def _other(self, rank: int, what: str) -> str:
        return (
            f"stage {self.keys} wrote keys of other documents than rank {rank} is given ({what}): both must read the same "
            "stage in the same number of tasks."
        )

    def _clean(self, document: Document, listed: dict[str, Listed]) -> bool:
        """Removes images and paragraphs that are listed; returns whether the document stays: a conversation only whole."""
        kept: list[Node] = []
        lost: list[tuple[str, str | None]] = []  # rule, and the paragraph, or None for an image
        for node in nodes_of(document):
            if node["type"] == "text":
                text = self._text(document, node["text"], listed, lost)
                kept += [node if text == node["text"] else text_node(text)] if text else []
            elif (rule := self._image_rule(document, node, listed)) is not None:
                self.count(rule, example=document, image=node.get("url"))
                lost.append((rule, None))
            else:
                kept.append(node)
        if lost and document.metadata.get("messages") is not None:
            self.count("conversation", example=document)
            self.lose("conversation", document)
            return False
        for rule, what in lost:
            self.lose(rule, what)
        if lost:
            example = copy.copy(document) if not kept else None
            set_nodes(document, kept)
            if example is not None:
                self.count("empty", example=example)
                self.lose("empty", document)
        return bool(kept) or not lost

    @staticmethod
    def _image_rule(document: Document, node: dict[str, Any], listed: dict[str, Listed]) -> str | None:
        for rule in ("image", "picture"):
            if rule in listed and any(key in listed[rule] for key in image_keys(rule, document, node)):
                return rule
        return None

    def _text(
        self, document: Document, text: str, listed: dict[str, Listed], lost: list[tuple[str, str | None]]
    ) -> str:
        if "paragraph" not in listed:
            return text
        kept = []
        for paragraph in text.split(BETWEEN_TEXTS):
            if any(key in listed["paragraph"] for key in paragraph_keys(document, paragraph)):
                self.count("paragraph", example=document, paragraph=paragraph[:500])
                lost.append(("paragraph", paragraph))
            else:
                kept.append(paragraph)
        return BETWEEN_TEXTS.join(kept)


def _checked(buckets: int) -> int:
    if not 1 <= buckets <= 9999:
        raise ConfigError(f"buckets={buckets} must be from 1 to 9999: so many that the keys of one fit in memory.")
    return buckets
