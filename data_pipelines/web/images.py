"""What `fetch` and `resolve` share: giving image nodes their bytes, or the reason why they have none."""

from __future__ import annotations

from typing import Any

from datatrove.data import Document

from data_pipelines.frame.document import Node, add_image, images_of, set_nodes
from data_pipelines.web.download import RETRYABLE, Outcome


def wanted(document: Document, retry: bool) -> list[Node]:
    """The images without bytes: those never tried, or with `retry` those that may succeed now."""
    return [
        node
        for node in images_of(document)
        if not node.get("sha256") and (node["fetch"]["status"] in RETRYABLE if "fetch" in node else not retry)
    ]


def settle(document: Document, node: Node, outcome: Outcome) -> None:
    """Keeps bytes, format and size of an image, and what became of its URL."""
    before = node.get("fetch") or {}
    status: dict[str, Any] = {"status": outcome.status, "tries": before.get("tries", 0) + 1}
    if outcome.code:
        status["code"] = outcome.code
    if outcome.url:
        status["url"] = outcome.url
    node["fetch"] = status
    if outcome.info is not None:
        info = outcome.info
        add_image(document, node, outcome.content, format=info.format.lower(), width=info.width, height=info.height)


def without_missing(document: Document) -> None:
    """Takes out the images without bytes."""
    nodes = document.metadata["nodes"]
    set_nodes(document, [node for node in nodes if node["type"] != "image" or node.get("sha256")])
