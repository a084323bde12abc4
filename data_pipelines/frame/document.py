"""A page or sample on its way through a pipeline, as a datatrove `Document`.

- `id`: a key that stays the same from run to run
- `text`: before `extract` the HTML; after it the texts of the nodes, joined by two newlines
- `media`: the images whose bytes are known, each once, by the SHA-256 of its bytes
- `metadata`: `url`; `source` (where it is from: WARC pointer, date, licence); and from `extract` on `nodes` in reading order:
  `{"type": "text", "text": ...}` and `{"type": "image", "url": ..., "alt": ..., "caption": ..., "sha256": ..., "format": ...,
  "width": ..., "height": ..., "rendered_width": ..., "rendered_height": ...}`. A field that is not known is left out; an
  image without `sha256` has no bytes yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from m4train.errors import DataError

if TYPE_CHECKING:
    from datatrove.data import Document, Media

Node = dict[str, Any]
BETWEEN_TEXTS = "\n\n"
_TEXTLESS = " "  # datatrove takes a document without text for a mistake


def key_of(*parts: object) -> str:
    """A key of 32 hexadecimal digits from what names a document, such as its URL and its date."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def new_document(
    key: str, url: str, source: dict[str, Any], nodes: list[Node] | None = None, text: str = ""
) -> Document:
    """A document of nodes, or of the `text` of a page that no nodes were made of yet."""
    from datatrove.data import Document

    document = Document(text=text or _TEXTLESS, id=key, metadata={"url": url, "source": source})
    if nodes is not None:
        set_nodes(document, nodes)
    return document


def nodes_of(document: Document) -> list[Node]:
    """The nodes in reading order. Raises DataError for a page that has not been through `extract`."""
    nodes = document.metadata.get("nodes")
    if nodes is None:
        raise DataError(
            f"Document {document.id} ({document.metadata.get('url')}) has no nodes: put the step extract before."
        )
    return nodes


def set_nodes(document: Document, nodes: list[Node]) -> None:
    """Gives the document these nodes, the text that follows from them, and only the image bytes that they use."""
    document.metadata["nodes"] = nodes
    document.text = BETWEEN_TEXTS.join(node["text"] for node in nodes if node["type"] == "text") or _TEXTLESS
    used = {node.get("sha256") for node in nodes if node["type"] == "image"}
    document.media = [media for media in document.media if media.id in used]


def text_node(text: str) -> Node:
    return {"type": "text", "text": text}


def image_node(url: str, **fields: Any) -> Node:
    """An image; fields that are None are left out."""
    return {"type": "image", "url": url, **{name: value for name, value in fields.items() if value is not None}}


def merge_texts(nodes: Iterable[Node]) -> list[Node]:
    """The nodes with texts that follow each other made one, two newlines between them."""
    merged: list[Node] = []
    for node in nodes:
        if node["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = text_node(merged[-1]["text"] + BETWEEN_TEXTS + node["text"])
        else:
            merged.append(node)
    return merged


def images_of(document: Document) -> Iterator[Node]:
    """The image nodes in reading order; none of a page without nodes."""
    return (node for node in document.metadata.get("nodes") or () if node["type"] == "image")


def add_image(document: Document, node: Node, content: bytes, **fields: Any) -> None:
    """Gives an image node its bytes, kept as they are, and fields such as format, width and height."""
    from datatrove.data import Media, MediaType

    node["sha256"] = hashlib.sha256(content).hexdigest()
    node.update({name: value for name, value in fields.items() if value is not None})
    if all(media.id != node["sha256"] for media in document.media):
        document.media.append(
            Media(id=node["sha256"], type=MediaType.IMAGE, url=node.get("url", ""), media_bytes=content)
        )


def image_bytes(document: Document, node: Node) -> bytes | None:
    """The original bytes of an image node; None if they are not known. Raises DataError if the store lost or changed them."""
    for media in document.media:
        if media.id == node.get("sha256"):
            return media_bytes(media)
    if node.get("sha256"):
        raise DataError(f"Document {document.id} names image {node['sha256']} but does not hold it.")
    return None


def media_bytes(media: Media) -> bytes:
    """The bytes of one image, from memory or from the images of an earlier stage."""
    if media.media_bytes is not None:
        return media.media_bytes
    if media.path is None or media.offset is None or media.length is None:
        raise DataError(f"Image {media.id} has neither bytes nor a place that holds them.")
    with open(media.path, "rb") as file:
        file.seek(media.offset)
        content = file.read(media.length)
    if hashlib.sha256(content).hexdigest() != media.id:
        raise DataError(
            f"Image {media.id} at byte {media.offset} of {media.path} is damaged: run the stage that wrote it again."
        )
    return content
