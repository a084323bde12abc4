"""`decontaminate`: what evaluation sets hold is removed from training documents, with a list of everything that was hit.

Images are compared by SHA-256 and by perceptual hash; texts by runs of 13 words (Brown et al. 2020, arXiv:2005.14165, appendix C).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from datatrove.data import Document

from data_pipelines.corpus.buckets import key_hash
from data_pipelines.corpus.measures import words_of
from data_pipelines.corpus.picture_hash import distance, is_flat, perceptual_hash
from data_pipelines.corpus.stored import StoredShards
from data_pipelines.frame.document import Node, image_bytes, nodes_of, set_nodes
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import packed
from m4train.errors import BadSample, ConfigError
from m4train.processing.images import decode_image

HITS = "hits"


class Decontaminate(Step):
    """Compares documents with the samples of `against`, each `{path: ..., format: ...}` and further options of a source.

    A document with `ngram` words in a row of an evaluation text is dropped; `images` says what becomes of one that shows an
    image of them, or one whose perceptual hash differs in at most `image_distance` of 64 bits. Words in a row that more than
    `shared` evaluation samples have are a prompt, and not compared. `hits/RRRRR.jsonl.gz` of the stage lists what was hit.
    """

    name = "decontaminate"

    def __init__(
        self,
        against: list[dict[str, Any]],
        ngram: int = 13,
        shared: int = 10,
        image_distance: int = 4,
        images: Literal["drop_image", "drop_document"] = "drop_document",
    ) -> None:
        super().__init__()
        if not against:
            raise ConfigError("decontaminate.against is empty: name the evaluation sets.")
        if ngram < 1 or shared < 1 or not 0 <= image_distance <= 20:
            raise ConfigError(
                f"decontaminate: ngram={ngram} and shared={shared} must be at least 1, image_distance={image_distance} 0 to 20."
            )
        self.ngram, self.shared, self.image_distance, self.images = ngram, shared, image_distance, images
        self.against = [
            StoredShards.of(each["path"], {k: v for k, v in each.items() if k != "path"}, f"decontaminate.against[{n}]")
            for n, each in enumerate(against)
            if _has_path(each, n)
        ]

    def inputs(self) -> list[tuple[str, int]]:
        return [entry for stored in self.against for entry in stored.inputs()]

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        evaluation = Evaluation(self.against, self.ngram, self.shared)
        if rank == 0:  # the same on every rank
            for label, number in evaluation.counts.items():
                self.count(f"evaluation {label}", number)
        with packed(self.folder() / HITS / f"{rank:05d}.jsonl.gz") as lines:
            for document in documents:
                hits = [*self._texts(document, evaluation), *self._images(document, evaluation)]
                for hit in hits:
                    line = {"id": document.id, "url": document.metadata.get("url", ""), **hit}
                    line.pop("node", None)
                    lines.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                if self._keep(document, hits):
                    self.count("kept", example=document)
                    yield document

    def _texts(self, document: Document, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
        """The first run of words that an evaluation text has, too."""
        words = words_of(document.text)
        for start, key in enumerate(grams(words, self.ngram)):
            if key in evaluation.grams:
                run = " ".join(words[start : start + self.ngram])
                yield {"kind": "text", "evaluation": evaluation.names[evaluation.grams[key]], "words": run}
                return

    def _images(self, document: Document, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
        for node in nodes_of(document):
            data = image_bytes(document, node) if node["type"] == "image" else None
            if data is None:
                continue
            about = {"image": node.get("url"), "sha256": node["sha256"], "node": node}
            name = evaluation.sums.get(hashlib.sha256(data).hexdigest())
            if name is not None:
                yield {"kind": "image", "evaluation": evaluation.names[name], **about}
                continue
            found = evaluation.nearest(data)
            if found is not None and found[1] <= self.image_distance:
                yield {"kind": "picture", "evaluation": evaluation.names[found[0]], "distance": found[1], **about}

    def _keep(self, document: Document, hits: Sequence[dict[str, Any]]) -> bool:
        for hit in hits:
            why = {name: value for name, value in hit.items() if name != "node"}
            self.count(hit["kind"], example=document, **why)
        pictured = [hit["node"] for hit in hits if "node" in hit]
        if len(pictured) < len(hits) or (pictured and self.images == "drop_document"):
            self.count("dropped")
            return False
        if not pictured:
            return True
        kept: list[Node] = [node for node in nodes_of(document) if all(node is not hit for hit in pictured)]
        if document.metadata.get("messages") is not None or not kept:
            self.count("dropped")
            return False
        set_nodes(document, kept)
        return True


def _has_path(given: Any, number: int) -> bool:
    if not isinstance(given, dict) or not given.get("path"):
        raise ConfigError(f"decontaminate.against[{number}]={given!r} names no path: give {{path: ..., format: ...}}.")
    return True


def grams(words: Sequence[str], size: int) -> Iterator[int]:
    """The hash of every run of `size` words, in order."""
    for start in range(len(words) - size + 1):
        yield key_hash("\0".join(words[start : start + size]))


class Evaluation:
    """What evaluation sets hold: `names` of their samples; by hash the number of the sample, of its runs of words (`grams`) and of
    its image files (`sums`)."""

    def __init__(self, against: Sequence[StoredShards], ngram: int, shared: int) -> None:
        self.names: list[str] = []
        self.grams: dict[int, int] = {}
        self.sums: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        looks: list[tuple[int, int]] = []
        often: Counter[int] = Counter()
        for stored in (each for shards in against for each in shards.samples(0, 1)):
            try:
                sample, images = stored.sample(), stored.images()
            except BadSample:
                self.counts["unreadable"] += 1
                continue
            number = len(self.names)
            self.names.append(f"{stored.shard.rpartition('/')[2]} {stored.key}")
            texts = [words_of(item["text"]) for item in sample.all_items() if "text" in item]
            texts += map(words_of, sample.references)
            self.counts["samples"] += 1
            self.counts["texts too short to compare"] += sum(len(words) < ngram for words in texts)
            runs = {key for words in texts for key in grams(words, ngram)}
            often.update(runs)
            for key in runs:
                self.grams.setdefault(key, number)
            for data in images:
                self.counts["images"] += 1
                self.sums.setdefault(hashlib.sha256(data).hexdigest(), number)
                if (look := _look(data)) is not None:
                    looks.append((look, number))
        prompts = [key for key, count in often.items() if count > shared]
        for key in prompts:
            del self.grams[key]
        self.counts["runs of words taken for prompts"] += len(prompts)
        self._looks = np.array([look for look, _ in looks], np.uint64)
        self._of = [number for _, number in looks]

    def nearest(self, data: bytes) -> tuple[int, int] | None:
        """The sample whose image looks most like this, and in how many bits they differ; None if it cannot be compared."""
        look = _look(data)
        if look is None or not len(self._looks):
            return None
        differing = distance(self._looks, look)
        place = int(differing.argmin())
        return self._of[place], int(differing[place])


def _look(data: bytes) -> int | None:
    """The perceptual hash of an image; None if it cannot be decoded, or shows nothing, as all such look the same."""
    try:
        image = decode_image(data)
    except BadSample:
        return None
    return None if is_flat(image) else perceptual_hash(image)
