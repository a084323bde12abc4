"""Steps and folders for tests of the frame of data pipelines."""

from __future__ import annotations

import hashlib
import io
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from PIL import Image

from data_pipelines.frame.document import add_image, image_bytes, image_node, images_of, new_document, text_node
from data_pipelines.frame.step import Step


def picture(number: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number * 37 % 256, number * 91 % 256, 40)).save(buffer, "PNG")
    return buffer.getvalue()


class MakePages(Step):
    """Documents numbered from 0, each rank every world_size-th, with a text and a picture that two share."""

    name = "make"

    def __init__(self, pages: int = 20, files: list[int] | None = None) -> None:
        super().__init__()
        self.pages, self.files = pages, files or []

    def inputs(self) -> list[tuple[str, int]]:
        return [(f"file-{number}", size) for number, size in enumerate(self.files)]

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        for number in range(rank, self.pages, world_size):
            url = f"http://example.org/{number}"
            node = image_node(f"{url}.png", alt=f"picture {number}")
            document = new_document(f"{number:04d}", url, {"date": "2026"}, [text_node(f"page {number} of all"), node])
            add_image(document, node, picture(number // 2), format="png", width=8, height=8)
            yield document


class DropOdd(Step):
    """Drops what is odd, and fails, or is killed, once a file is not there yet."""

    name = "odd"

    def __init__(self, fail_at: int | None = None, die_at: int | None = None, once: str = "") -> None:
        super().__init__()
        self.fail_at, self.die_at, self.once = fail_at, die_at, once

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        for document in documents:
            number = int(document.id)
            if number in (self.fail_at, self.die_at) and not (self.once and os.path.exists(self.once)):
                if self.once:
                    Path(self.once).touch()
                if number == self.die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError(f"page {number} cannot be read")
            self.measure("number", number, [5, 10], [7])
            if number % 2:
                self.count("odd", example=document, number_was=number)
            else:
                assert all(image_bytes(document, node) for node in images_of(document))
                yield document


def digests(folder: Path, pattern: str = "*/*-*.*") -> dict[str, str]:
    """The SHA-256 of every file of documents and images of a pipeline."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
