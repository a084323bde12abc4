"""The step `extract`: HTML to interleaved nodes in reading order, in a process that may die of a page."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from datatrove.data import Document

from data_pipelines.frame.document import add_image, images_of, set_nodes
from data_pipelines.frame.step import Step
from data_pipelines.web.child import PageLost, Parser
from m4train.errors import ConfigError

_TOP_TEXT = ("title", "language", "meta")


class Extract(Step):
    """Pages to nodes. A page that kills the parser, or takes too long, is counted and named by its URL, and the rest goes on."""

    name = "extract"

    def __init__(self, max_width: int = 2048, seconds: float = 20.0, max_characters: int = 10_000_000) -> None:
        """`max_width`: pixels, of the candidates of a `srcset` the largest not over this is taken. `seconds`: for one page.
        `max_characters`: of a page; longer ones are left out."""
        super().__init__()
        for key, value in (("max_width", max_width), ("seconds", seconds), ("max_characters", max_characters)):
            if value <= 0:
                raise ConfigError(f"extract.{key}={value} must be above 0.")
        self.max_width, self.seconds, self.max_characters = max_width, seconds, max_characters

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        parser = Parser(self.max_width, self.seconds)
        try:
            for document in documents:
                if self._extracted(parser, document):
                    yield document
        finally:
            parser.close()

    def _extracted(self, parser: Parser, document: Document) -> bool:
        """Gives a document its nodes; whether there are any."""
        if len(document.text) > self.max_characters:
            self._named("too_long", document, f"{len(document.text)} characters")
            return False
        try:
            found = parser.extract(document.text, document.metadata["url"])
        except PageLost as lost:
            self._named(lost.reason, document, str(lost))
            return False
        if not found["nodes"]:
            self.count("nothing_to_read")
            return False
        for name in _TOP_TEXT:
            if name in found:
                document.metadata[name] = found[name]
        contents = [(node, node.pop("content")) for node in found["nodes"] if "content" in node]
        set_nodes(document, found["nodes"])
        for node, content in contents:  # images within the page itself
            node["url"] = f"data:sha256,{hashlib.sha256(content).hexdigest()}"
            add_image(document, node, content)
        self.count("images", sum(1 for _ in images_of(document)))
        return True

    def _named(self, reason: str, document: Document, detail: str) -> None:
        self.count(reason)
        named = self.ledger.examples.setdefault(reason, [])
        if len(named) < 20:
            url = document.metadata["url"]
            named.append({"id": document.id, "url": url, "nodes": [], "media": [], "detail": detail})
