"""`write`: documents to canonical shards with their index, split into training and validation by the hash of the URL.

In the folder of the stage: `shards/SPLIT-RRRRR-NNNNNN.tar` with `.index` next to each, `provenance/RRRRR.jsonl.gz` with a line for
every document, and `written/RRRRR.json` with what one rank wrote. `seal` makes `dataset.json` of all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document

from data_pipelines.frame.document import image_bytes, merge_texts, nodes_of
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import packed, write_json
from m4train.data.convert import image_extension
from m4train.data.index.build import build_structure
from m4train.data.shards import ShardWriter
from m4train.data.sources.records import marked_literal
from m4train.data.sources.tar import CanonicalTar
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.images import read_image_info

SHARDS, PROVENANCE, WRITTEN = "shards", "provenance", "written"
TRAIN, VALIDATION = "train", "validation"

Missing = Literal["error", "drop_image", "drop_document"]


class WriteShards(Step):
    """Writes every document as one sample and passes it on.

    `missing` says what becomes of an image without bytes, or whose bytes are not an image. A document without a licence of
    its own gets `license`; nothing is made up for it.
    """

    name = "write"

    def __init__(
        self,
        dataset: str = "web",
        license: str = "unknown",
        validation: float = 0.01,
        missing: Missing = "drop_image",
        max_bytes: int = 1 << 30,
        max_samples: int = 10_000,
    ) -> None:
        super().__init__()
        if not 0 <= validation < 1:
            raise ConfigError(f"write.validation={validation} is not a share of the documents: 0 to below 1.")
        if not license:
            raise ConfigError("write.license is empty: name the licence, or leave it at unknown.")
        self.dataset, self.license, self.validation, self.missing = dataset, license, validation, missing
        self.limits = {"max_bytes": max_bytes, "max_samples": max_samples}

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        folder = self.folder()
        for left in (folder / SHARDS).glob(f"*-{rank:05d}-[0-9]*"):
            left.unlink()  # of an attempt that was killed
        splits = [TRAIN, VALIDATION] if self.validation else [TRAIN]
        with ExitStack() as stack:
            lines = stack.enter_context(packed(folder / PROVENANCE / f"{rank:05d}.jsonl.gz"))
            writers = {
                split: stack.enter_context(ShardWriter(folder / SHARDS, f"{split}-{rank:05d}", **self.limits))
                for split in splits
            }
            record = _Record({split: Counter() for split in splits})
            for document in documents:
                split = split_of(document, self.validation)
                if self._write(document, split, writers[split], record, lines):
                    yield document
        shards = [path for split in splits for path in writers[split].paths]
        for path in shards:
            build_structure(str(path), CanonicalTar())
        write_json(folder / WRITTEN / f"{rank:05d}.json", record.to_dict(shards))

    def _write(self, document: Document, split: str, writer: ShardWriter, record: _Record, lines: Any) -> bool:
        try:
            sample, images = self._sample(document)
        except BadSample as error:
            if self.missing == "error":
                raise DataError(
                    f"Document {document.id} ({document.metadata.get('url')}): {error.detail}; "
                    "set write.missing to drop_image or drop_document to go on without."
                ) from None
            self.count(error.reason, example=document, why=error.detail)
            return False
        key = document.id.replace(".", "_").replace("/", "_").lstrip("_")
        if key in writer:
            key = f"{key}-{sum(record.counts[split].values())}"
            self.count("same_key")
        writer.write(key, sample, images)
        sizes = {"samples": 1, "images": len(images), "image_bytes": sum(map(len, images.values()))}
        record.counts[split].update(sizes | {"words": len(document.text.split())})
        record.licenses[sample["source"]["license"]] += 1
        line = {"key": key, "split": split, "shard": len(writer.paths), **sample["source"]}
        lines.write(json.dumps(line, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace") + b"\n")
        return True

    def _sample(self, document: Document) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The canonical JSON and the images by member name. Raises BadSample if nothing of the document is left."""
        images: dict[str, bytes] = {}
        names: dict[str, str] = {}  # SHA-256 -> member: what a document shows twice is stored once
        items = []
        whole = document.metadata.get("messages") is not None  # texts that follow each other may be of two turns
        for node in nodes_of(document) if whole else merge_texts(nodes_of(document)):
            if node["type"] == "text":
                text = node["text"].encode("utf-8", "replace").decode()
                items += [{"text": text}] if whole or text.strip() else []
            elif (item := self._image(document, node, images, names)) is not None:
                items.append(item)
        body = self._body(document, items)
        metadata = document.metadata
        source = {"dataset": self.dataset, "license": self.license}
        source |= {"url": metadata["url"]} if metadata.get("url") else {}
        named = {"licence": "license"}  # as `warc` calls it
        source |= {named.get(k, k): value for k, value in metadata.get("source", {}).items() if value is not None}
        kept = {name: metadata[name] for name in ("scores", "references") if metadata.get(name)}
        return marked_literal(body | {"source": source} | kept), images

    @staticmethod
    def _body(document: Document, items: list[dict[str, Any]]) -> dict[str, Any]:
        messages = document.metadata.get("messages")
        if messages is None:
            if not items:
                raise BadSample("empty", "no text and no image is left")
            return {"items": items}
        return {"messages": conversation(messages, items)}

    def _image(
        self, document: Document, node: dict[str, Any], images: dict[str, bytes], names: dict[str, str]
    ) -> dict[str, Any] | None:
        try:
            data = image_bytes(document, node)
            if data is None:
                raise BadSample("image_missing", f"image {node.get('url')} has no bytes")
            info = read_image_info(data)
        except BadSample as error:
            reason = error.reason if error.reason == "image_missing" else "image_unreadable"
            if self.missing != "drop_image" or document.metadata.get("messages") is not None:
                raise BadSample(reason, error.detail) from None
            self.count(reason, example=document, image=node.get("url"), why=error.detail)
            return None
        name = names.setdefault(node["sha256"], f"{len(names)}.{image_extension(info.format)}")
        images[name] = data
        item = {"image": name, "width": info.width, "height": info.height}
        alt = node.get("alt") or node.get("caption")
        return item | ({"alt": alt} if alt else {}) | ({"source": node["url"]} if node.get("url") else {})


@dataclass
class _Record:
    """What one rank wrote."""

    counts: dict[str, Counter[str]]
    licenses: Counter[str] = field(default_factory=Counter)

    def to_dict(self, shards: list[Path]) -> dict[str, Any]:
        files = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in shards]
        counts = {split: dict(sorted(count.items())) for split, count in self.counts.items()}
        return {"counts": counts, "licenses": dict(sorted(self.licenses.items())), "shards": files}


def conversation(messages: list[dict[str, Any]], items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their content filled from the items of the document, which are in the same order.

    `messages` say how many nodes of the document each has (`nodes`). Raises BadSample if a step removed some of them: what is
    left of a conversation may not fit together.
    """
    if sum(message["nodes"] for message in messages) != len(items):
        raise BadSample("conversation_cut", f"of its {sum(m['nodes'] for m in messages)} nodes {len(items)} are left")
    rest, found = list(items), []
    for message in messages:
        count = message["nodes"]
        content, rest = rest[:count], rest[count:]
        found.append({name: value for name, value in message.items() if name != "nodes"} | {"content": content})
    return found


def split_of(document: Document, validation: float) -> str:
    """`validation` for this share of all URLs, by their hash: all versions of a page are in the same split, whatever else changes."""
    named = document.metadata.get("url") or document.id
    digest = hashlib.sha256(named.encode("utf-8", "surrogatepass")).digest()
    return VALIDATION if int.from_bytes(digest[:8], "big") < validation * 2**64 else TRAIN


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
