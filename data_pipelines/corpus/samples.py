"""`samples`: documents out of existing datasets, in any format that training reads, and in those that name images by URL only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from datatrove.data import Document

from data_pipelines.corpus.published import PUBLISHED
from data_pipelines.corpus.stored import StoredSample, StoredShards
from data_pipelines.frame.document import add_image, image_node, key_of, new_document, set_nodes, text_node
from data_pipelines.frame.step import Step
from m4train.data.convert import image_extension
from m4train.data.shards import expand_shards
from m4train.data.storage.files import stamps
from m4train.errors import BadSample, ConfigError
from m4train.processing.images import read_image_info


class ReadSamples(Step):
    """The samples of `path`, each rank those of every `tasks`-th file.

    `format` is one of training's (`options` are then those of a source: fields, image_folder ...), or `obelics_urls`,
    `mmc4_urls` or `pairs_urls`, of which `fetch` or `resolve` gets the images.
    """

    name = "samples"

    def __init__(self, path: str, format: str = "auto", options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.form = format
        if format in PUBLISHED:
            if options:
                raise ConfigError(f"samples.options={options} means nothing for format {format}: leave it out.")
            self.paths = expand_shards(path)
        else:
            self.stored = StoredShards.of(path, {**(options or {}), "format": format}, "samples")

    def inputs(self) -> list[tuple[str, int]]:
        if self.form in PUBLISHED:
            return [(path, int(found[0])) for path, found in stamps(self.paths).items()]
        return self.stored.inputs()

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        if self.form in PUBLISHED:
            for path in self.paths[rank::world_size]:
                for number, row in enumerate(PUBLISHED[self.form](path)):
                    yield from self._read(lambda row=row, path=path, number=number: _of_row(row, path, number))
            return
        for stored in self.stored.samples(rank, world_size):
            yield from self._read(lambda stored=stored: document_of(stored))

    def _read(self, make: Any) -> Iterator[Document]:
        try:
            document = make()
        except BadSample as error:
            self.count(f"unreadable {error.reason}")
            return
        yield document


def _of_row(row: Any, path: str, number: int) -> Document:
    if isinstance(row, BadSample):
        raise row
    url, source, nodes = row
    return new_document(key_of(path.rpartition("/")[2], number, url), url, source, nodes)


def document_of(stored: StoredSample) -> Document:
    """A document with the text and the image bytes of a stored sample; of a conversation also who says which node.

    Raises BadSample.
    """
    sample, images = stored.sample(), iter(stored.images())
    origin = dict(sample.source)
    url = str(origin.pop("url", None) or "")
    key = key_of(stored.shard.rpartition("/")[2], stored.key)
    document = new_document(key, url, origin, [])
    nodes = []
    for item in sample.all_items():
        if "image" not in item:
            nodes.append(text_node(item["text"]))
            continue
        data = next(images)
        info = read_image_info(data)
        node = image_node(str(item.get("source") or ""), alt=item.get("alt"))
        add_image(document, node, data, format=image_extension(info.format), width=info.width, height=info.height)
        nodes.append(node)
    set_nodes(document, nodes)
    if sample.messages is not None:
        document.metadata["messages"] = [
            {"nodes": len(message["content"])} | {name: value for name, value in message.items() if name != "content"}
            for message in sample.messages
        ]
    kept = {"scores": sample.scores, "references": list(sample.references)}
    document.metadata.update({name: value for name, value in kept.items() if value})
    return document
