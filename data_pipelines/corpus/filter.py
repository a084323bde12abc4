"""`filter`: images, then paragraphs, then whole documents are kept or dropped by rules (see `rules.py`).

What is dropped is counted under the first rule it fails, as `image/width` or `document/words`, and examples of it are kept, with
the value that was measured. A text is cut into words once, for all rules of paragraph and document together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from datatrove.data import Document

from data_pipelines.corpus.measures import Text
from data_pipelines.corpus.rules import Rule, Rules
from data_pipelines.frame.document import BETWEEN_TEXTS, image_bytes, images_of, nodes_of, set_nodes, text_node
from data_pipelines.frame.step import Step
from m4train.errors import BadSample
from m4train.processing.images import read_image_info

END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"  # a paragraph of OBELICS between two documents on one page
_FORMATS = {"jpeg": "jpg", "mpo": "jpg"}


class Filter(Step):
    """Applies `rules`: those of `conf/pipeline/filters/`, see docs/pipelines.md."""

    name = "filter"

    def __init__(self, rules: dict[str, Any]) -> None:
        super().__init__()
        self.rules = Rules(rules)

    def inputs(self) -> list[tuple[str, int]]:
        models = self.rules.models
        files = [
            *self.rules.references,
            *(models[key] for key in ("words", "common_words", "perplexity") if models[key]),
        ]
        return [(path, os.path.getsize(path)) for path in files]

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        for document in documents:
            if self._nodes(document) and self._document(document):
                self.count("kept", example=document)
                yield document

    # Nodes ----------------------------------------------------------------------------------------------------------

    def _nodes(self, document: Document) -> bool:
        """Removes the images and paragraphs that fail; returns whether the document stays: a conversation only as a whole."""
        self._whole = whole = document.metadata.get("messages") is not None
        kept: list[dict[str, Any]] = []
        texts: list[Text] = []
        seen: set[str] = set()
        for node in nodes_of(document):
            if node["type"] == "image":
                failed = self._image(document, node, seen)
                kept += [] if failed else [node]
            else:
                paragraphs = self._paragraphs(document, node["text"])
                failed = len(paragraphs) < (node["text"].count(BETWEEN_TEXTS) + 1)
                texts += paragraphs
                kept += [text_node(BETWEEN_TEXTS.join(part.text for part in paragraphs))] if paragraphs else []
            if failed and whole:
                self.count("conversation", example=document)
                self.lose("conversation", document)
                return False
        if not whole:
            set_nodes(document, kept)
        self._text = Text.joined(texts, BETWEEN_TEXTS)
        return True

    def _image(self, document: Document, node: dict[str, Any], seen: set[str]) -> bool:
        """Whether an image fails, and under which rule; what is known of it only from its bytes is read from them."""
        rules = self.rules
        try:
            sizes = self._sizes(document, node) if rules.formats or rules.image or rules.score_nsfw else {}
        except BadSample as error:
            return self._drop(document, "image/unreadable", None, image=node.get("url"), why=error.detail)
        url = str(node.get("url") or "").lower()
        found = next((word for word in rules.url_words if word in url), None)
        if found is not None:
            return self._drop(document, "image/url_words", None, image=node.get("url"), word=found)
        if rules.formats and sizes["format"] not in rules.formats:
            return self._drop(document, "image/formats", None, image=node.get("url"), format=sizes["format"])
        named = url or str(node.get("sha256"))
        if rules.once and named in seen:
            return self._drop(document, "image/once", None, image=node.get("url"))
        seen.add(named)
        for rule in rules.image:
            value = sizes.get(rule.name) if rule.measure is None else rule.measure(document, node)
            if value is not None and self._fails(document, "image", rule, value, image=node.get("url")):
                return True
        return False

    def _sizes(self, document: Document, node: dict[str, Any]) -> dict[str, Any]:
        """Format, sizes as stored and as the page shows them (if it says), and width to height. Raises BadSample."""
        width, height, kind = node.get("width"), node.get("height"), node.get("format")
        if not (width and height and kind) or self.rules.score_nsfw:
            data = image_bytes(document, node)
            if data is None:
                raise BadSample("image_missing", "its bytes are not there, so it cannot be judged")
            info = read_image_info(data)
            width, height, kind = info.width, info.height, info.format
        kind = str(kind).lower()
        rendered = {name: node.get(name) for name in ("rendered_width", "rendered_height")}
        sizes = {"format": _FORMATS.get(kind, kind), "width": width, "height": height, "aspect": width / height}
        return sizes | rendered

    def _paragraphs(self, document: Document, text: str) -> list[Text]:
        kept = []
        for paragraph in text.split(BETWEEN_TEXTS):
            if paragraph.strip() == END_OF_DOCUMENT:
                kept.append(Text.of(paragraph))
                continue
            measured = Text.of(paragraph)
            if not any(self._fails(document, "paragraph", rule, None, measured) for rule in self.rules.paragraph):
                kept.append(measured)
        return kept

    # Documents ------------------------------------------------------------------------------------------------------

    def _document(self, document: Document) -> bool:
        rules, text = self.rules, self._text
        if rules.images:
            count = sum(1 for _ in images_of(document))
            if self._fails(document, "document", rules.images, count):
                return False
        if any(self._fails(document, "document", rule, None, text) for rule in rules.document):
            return False
        if rules.nsfw and not self._decent(document, rules.nsfw):
            return False
        return not any(
            self._fails(document, "document", rule, rule.measure(document)) for rule in rules.plugged if rule.measure
        )

    def _decent(self, document: Document, rule: Rule) -> bool:
        """Whether all images are; one that cannot be decoded is not scored as if it were black, but removed."""
        assert self.rules.score_nsfw is not None
        worst, bad = 0.0, []
        for node in images_of(document):
            try:
                data = image_bytes(document, node)
                worst = max(worst, self.rules.score_nsfw(data or b""))
            except BadSample as error:
                self._drop(document, "image/unreadable", None, image=node.get("url"), why=error.detail)
                bad.append(id(node))
        if bad:
            set_nodes(document, [node for node in nodes_of(document) if id(node) not in bad])
        if self._fails(document, "document", rule, worst):
            return False
        document.metadata.setdefault("scores", {})["nsfw"] = round(worst, 4)
        images = self.rules.images
        return not (bad and images and self._fails(document, "document", images, sum(1 for _ in images_of(document))))

    # Counting -------------------------------------------------------------------------------------------------------

    def _fails(
        self, document: Document, part: str, rule: Rule, value: float | None, text: Text | None = None, **why: Any
    ) -> bool:
        if value is None:
            assert rule.measure is not None
            value = rule.measure(text) if text is not None else rule.measure(document)
        self.measure(f"{part}/{rule.name}", value, rule.edges, rule.thresholds)
        if part == "document" and rule.name in ("language", "perplexity"):
            document.metadata.setdefault("scores", {})[rule.name] = round(value, 4)
        if rule.allows(value):
            return False
        if part == "paragraph" and text is not None:
            why["paragraph"] = text.text[:500]
        return self._drop(document, f"{part}/{rule.name}", value, text.text if text else "", **why)

    def _drop(self, document: Document, label: str, value: float | None, text: str = "", **why: Any) -> bool:
        found = why if value is None else {**why, "value": value}
        self.count(label, example=document, **found)
        part = label.partition("/")[0]
        if part == "document" or not self._whole:  # a conversation goes as a whole, or not at all
            self.lose(label, {"document": document, "paragraph": text}.get(part))
        return True
