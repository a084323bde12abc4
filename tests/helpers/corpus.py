"""Documents for tests of the steps between extraction and shards, and pipelines of such steps."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document

from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.document import add_image, image_node, new_document, set_nodes, text_node
from data_pipelines.frame.runner import run_pipeline
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import read_documents
from tests.helpers.pipelines import picture


def page(number: int, nodes: Sequence[Any], url: str | None = None, **source: Any) -> Document:
    """A document of texts (strings), images (bytes, or the URL of one without), in this order."""
    document = new_document(f"page-{number:05d}", url or f"http://site.org/{number}", dict(source), [])
    made = []
    for place, given in enumerate(nodes):
        if isinstance(given, str) and not given.startswith("http://img/"):
            made.append(text_node(given))
            continue
        node = image_node(given if isinstance(given, str) else f"http://img/{number}-{place}.png")
        if isinstance(given, bytes):
            add_image(document, node, given, format="png", width=8, height=8)
        made.append(node)
    set_nodes(document, made)
    return document


def copied(document: Document) -> Document:
    """A deep copy: steps change what they are given."""
    import copy

    return copy.deepcopy(document)


class Given(Step):
    """The documents of a JSON file of [number, nodes, url, source], images being `png:NUMBER`; each rank every world_size-th."""

    name = "given"

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        for number, nodes, url, source in json.loads(Path(self.file).read_text())[rank::world_size]:
            yield page(number, [picture(int(n[4:])) if n.startswith("png:") else n for n in nodes], url, **source)


class Killed(Step):
    """Passes documents on until the process is killed at one of them, the first time only."""

    name = "killed"

    def __init__(self, once: str, at: int = 5) -> None:
        super().__init__()
        self.once, self.at = once, at

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        for number, document in enumerate(documents):
            if number == self.at and rank == 1 and not Path(self.once).exists():
                Path(self.once).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield document


def run_stages(folder: Path, pages: list[list[Any]], stages: dict[str, Any], *overrides: str, tasks: int = 3) -> int:
    """Runs stages on these pages in `folder`/out; the pages come from a stage `given`."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "pages.json").write_text(json.dumps(pages))
    steps = {"given": {"step": "tests.helpers.corpus:Given", "file": str(folder / "pages.json")}}
    config = {"defaults": [{"executor": "local"}, "_self_"], "folder": str(folder / "out"), "tasks": tasks}
    config["stages"] = {"given": {"steps": steps}} | stages
    (folder / "pipeline.yaml").write_text(json.dumps(config))
    return run_pipeline(load_pipeline(str(folder / "pipeline.yaml"), list(overrides)))


def documents_of(folder: Path) -> list[Document]:
    return list(read_documents(folder))


def statistics_of(folder: Path) -> dict[str, Any]:
    return {each["name"]: each for each in json.loads((folder / "statistics.json").read_text())}


def json_lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
