"""Documents and images on disk between two stages, and files that are whole as soon as they have their name.

A stage folder holds for every rank `documents-00000.jsonl.gz`, a JSON object a line, and `images-00000.tar` with the bytes
that this rank added, named by their SHA-256. Documents refer to bytes of earlier stages by path, relative to
their own folder, so that images are written once and a pipeline's folder can be moved. The same documents give the same bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_pipelines.frame.document import new_document, set_nodes
from m4train.durable import fsync_folder
from m4train.errors import DataError

if TYPE_CHECKING:
    from datatrove.data import Document, Media

_LEVEL = 3  # of gzip: half the time of the default for a tenth more bytes
_UNFINISHED = ".unfinished"
_REMEMBERED = 100_000  # images of one rank; one that comes again after so many others is written again


@contextlib.contextmanager
def aside(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name only after all of it is on disk; an exception leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Writes JSON aside and renames it."""
    with aside(path) as file:
        file.write(json.dumps(values, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass") + b"\n")


@contextlib.contextmanager
def packed(path: Path) -> Iterator[IO[bytes]]:
    """As `aside`, for a gzip file whose bytes depend on the content alone."""
    with aside(path) as file, gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as stream:
        yield stream  # type: ignore[misc]


def documents_path(folder: Path, rank: int) -> Path:
    return folder / f"documents-{rank:05d}.jsonl.gz"


def images_path(folder: Path, rank: int) -> Path:
    return folder / f"images-{rank:05d}.tar"


def write_documents(documents: Iterable[Document], folder: Path, rank: int) -> int:
    """Writes the documents of one rank and the images that only memory holds yet; returns their number.

    Nothing of a rank can be seen before all of it is written.
    """
    count = 0
    with aside(images_path(folder, rank)) as images:
        store = _Images(images, images_path(folder, rank))
        with packed(documents_path(folder, rank)) as lines:
            for document in documents:
                line = json.dumps(_record(document, store, folder), ensure_ascii=False, separators=(",", ":"))
                lines.write(line.encode("utf-8", "replace") + b"\n")
                count += 1
        store.close()
    return count


def read_documents(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
    """The documents of a stage folder that one of `world_size` ranks has to process, in order; image bytes are read when asked for.

    Raises DataError if the folder holds none, or a damaged file.
    """
    paths = sorted(folder.glob("documents-*.jsonl.gz"))
    if not paths:
        raise DataError(
            f"{folder} holds no documents (documents-00000.jsonl.gz): run the stage that writes them first."
        )
    for path in paths[rank::world_size]:
        read = 0
        try:
            with gzip.open(path, "rb") as lines:
                for line in lines:
                    yield _document(json.loads(line), folder)
                    read += 1
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            raise DataError(
                f"{path} is damaged after line {read} ({error}): run the stage that wrote it again."
            ) from None


def _record(document: Document, store: _Images, folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"id": document.id}
    if "nodes" not in document.metadata:
        record["text"] = document.text
    record["metadata"] = document.metadata
    if document.media:
        record["media"] = [store.place_of(media, folder) for media in document.media]
    return record


def _document(record: dict[str, Any], folder: Path) -> Document:
    from datatrove.data import Media, MediaType

    metadata = record["metadata"]
    document = new_document(
        record["id"], metadata.get("url", ""), metadata.get("source", {}), text=record.get("text", "")
    )
    document.metadata = metadata
    document.media = [
        Media(
            id=media["id"],
            type=MediaType.IMAGE,
            url=media["url"],
            path=os.path.normpath(folder / media["path"]),
            offset=media["offset"],
            length=media["length"],
        )
        for media in record.get("media", ())
    ]
    if "nodes" in metadata:
        set_nodes(document, metadata["nodes"])
    return document


class _Images:
    """The images tar of one rank: every content once, if it comes again soon."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._places: dict[str, tuple[int, int]] = {}  # SHA-256 -> offset and length
        self._end = 0

    def place_of(self, media: Media, folder: Path) -> dict[str, Any]:
        """Where the bytes of an image are, after they were written if only memory held them."""
        content = media.media_bytes
        if content is None:
            place = {"path": os.path.relpath(str(media.path), folder), "offset": media.offset, "length": media.length}
            return {"id": media.id, "url": media.url, **place}
        if media.id not in self._places:
            header = tarfile.TarInfo(media.id)
            header.size = len(content)
            head = header.tobuf(tarfile.USTAR_FORMAT)
            self._places[media.id] = (self._end + len(head), len(content))
            if len(self._places) > _REMEMBERED:
                del self._places[next(iter(self._places))]
            padding = -len(content) % tarfile.BLOCKSIZE
            self._file.write(head)
            self._file.write(content)
            self._file.write(bytes(padding))
            self._end += len(head) + len(content) + padding
        offset, length = self._places[media.id]
        return {"id": media.id, "url": media.url, "path": self._path.name, "offset": offset, "length": length}

    def close(self) -> None:
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))


def open_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, packed by gzip or not."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        yield from io.TextIOWrapper(file, encoding="utf-8")
