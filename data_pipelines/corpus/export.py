"""`export`: documents as parquet or JSON lines that other tools read, with the image bytes as they are stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document

from data_pipelines.frame.document import Node, image_bytes, nodes_of
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import aside
from m4train.config.packages import need
from m4train.errors import ConfigError

EXPORTED = "exported"
_GROUP = 200  # rows of a row group: images are large


class Export(Step):
    """Writes every document to `exported/RRRRR.parquet` or `.jsonl` of the stage, and passes it on.

    `obelics`: parallel lists `images` (bytes) and `texts` with the metadata of OBELICS. `messages`: conversations as lists of
    roles and contents. `json`: either of them as JSON lines, with the images as files in `exported/images`. Documents that are
    not of the form, or whose images have no bytes, are counted and left out.
    """

    name = "export"

    def __init__(self, form: Literal["obelics", "messages", "json"] = "obelics") -> None:
        super().__init__()
        if form not in ("obelics", "messages", "json"):
            raise ConfigError(f"export.form={form} is not known: obelics, messages or json.")
        self.form = form

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        folder = self.folder() / EXPORTED
        write = self._lines if self.form == "json" else self._parquet
        yield from write(documents, folder, rank)

    def _rows(self, documents: Iterable[Document], given: list[Document]) -> Iterator[dict[str, Any]]:
        """The rows of all documents that have the form; each such document is added to `given`."""
        for document in documents:
            pictures = [(node, image_bytes(document, node)) for node in nodes_of(document) if node["type"] == "image"]
            turns = document.metadata.get("messages")
            if any(data is None for _, data in pictures):
                self.count("image_missing", example=document)
            elif self.form != "json" and (turns is None) != (self.form == "obelics"):
                self.count("other form", example=document)
            else:
                given.append(document)
                yield _document(document) if turns is None else _conversation(document, turns)

    def _parquet(self, documents: Iterable[Document], folder: Path, rank: int) -> Iterator[Document]:
        need("pyarrow", "export.form=" + self.form)
        import pyarrow
        import pyarrow.parquet

        schema = _schema(pyarrow, self.form)
        given: list[Document] = []
        with aside(folder / f"{rank:05d}.parquet") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
            held: list[dict[str, Any]] = []
            for row in self._rows(documents, given):
                held.append(row)
                if len(held) >= _GROUP:
                    writer.write_table(pyarrow.Table.from_pylist(held, schema))
                    held = []
                yield given.pop()
            writer.write_table(pyarrow.Table.from_pylist(held, schema))

    def _lines(self, documents: Iterable[Document], folder: Path, rank: int) -> Iterator[Document]:
        given: list[Document] = []
        with aside(folder / f"{rank:05d}.jsonl") as file:
            for row in self._rows(documents, given):
                row["images"] = [image and _stored(image, folder) for image in row["images"]]
                row = {name: json.loads(value) if name.endswith("metadata") else value for name, value in row.items()}
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                yield given.pop()


def _stored(image: dict[str, Any], folder: Path) -> str:
    path = folder / "images" / image["path"][:2] / image["path"]
    if not path.exists():
        with aside(path) as file:
            file.write(image["bytes"])
    return str(path.relative_to(folder))


def _image(document: Document, node: Node) -> dict[str, Any]:
    return {"bytes": image_bytes(document, node), "path": f"{node['sha256']}.{node.get('format', 'bin')}"}


def _document(document: Document) -> dict[str, Any]:
    nodes = nodes_of(document)
    about = [
        None
        if node["type"] == "text"
        else {name: value for name, value in node.items() if name not in ("type", "sha256")}
        for node in nodes
    ]
    page = {"url": document.metadata.get("url", ""), **document.metadata.get("source", {})}
    return {
        "images": [_image(document, node) if node["type"] == "image" else None for node in nodes],
        "texts": [node["text"] if node["type"] == "text" else None for node in nodes],
        "metadata": json.dumps(about, ensure_ascii=False),
        "general_metadata": json.dumps(page, ensure_ascii=False),
    }


def _conversation(document: Document, turns: list[dict[str, Any]]) -> dict[str, Any]:
    nodes, messages = iter(nodes_of(document)), []
    for turn in turns:
        content = [next(nodes) for _ in range(turn["nodes"])]
        parts = [
            {"type": node["type"], "text": node.get("text") if node["type"] == "text" else None} for node in content
        ]
        messages.append(
            {"role": turn["role"], "content": parts} | ({"weight": turn["weight"]} if "weight" in turn else {})
        )
    pictures = [_image(document, node) for node in nodes_of(document) if node["type"] == "image"]
    return {"messages": messages, "images": pictures, "url": document.metadata.get("url", "")}


def _schema(pyarrow: Any, form: str) -> Any:
    text = pyarrow.string()
    images = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)]))
    if form == "obelics":
        return pyarrow.schema(
            [("images", images), ("texts", pyarrow.list_(text)), ("metadata", text), ("general_metadata", text)]
        )
    parts = pyarrow.list_(pyarrow.struct([("type", text), ("text", text)]))
    message = pyarrow.struct([("role", text), ("content", parts), ("weight", pyarrow.float64())])
    return pyarrow.schema([("messages", pyarrow.list_(message)), ("images", images), ("url", text)])
