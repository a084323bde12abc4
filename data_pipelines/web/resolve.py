"""The step `resolve`: the images of documents from what was downloaded before: WARC files, local folders, or img2dataset's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from datatrove.data import Document
from filelock import FileLock

from data_pipelines.frame.step import Step
from data_pipelines.frame.store import aside
from data_pipelines.web.download import Outcome, checked
from data_pipelines.web.images import settle, wanted, without_missing
from data_pipelines.web.img2dataset import images_of_shard, read_member
from data_pipelines.web.records import Pointer, opened, read_pointer, read_records
from m4train.data.storage.files import find_files, stamps
from m4train.durable import fsync_folder
from m4train.errors import ConfigError

INDEX = "places.npy"  # in the folder of the stage: where every image is, by the hash of its URL
_PLACE = np.dtype([("url", "u8"), ("file", "u4"), ("offset", "u8"), ("length", "u8")])
_MAX_BYTES = 100_000_000


class Resolve(Step):
    """Gives images the bytes that are stored for their URL. The first place that has one counts: folders, WARC files, img2dataset."""

    name = "resolve"

    def __init__(
        self,
        warc: list[str] | None = None,
        folders: dict[str, str] | None = None,
        img2dataset: list[str] | None = None,
        drop_missing: bool = False,
    ) -> None:
        """`warc`: files with globs. `folders`: beginning of a URL -> folder with what lies below it. `img2dataset`: its tar files,
        with globs. `drop_missing`: take out images that are found nowhere."""
        super().__init__()
        if not (warc or folders or img2dataset):
            raise ConfigError("resolve needs warc, folders or img2dataset: where the images are.")
        self.warc, self.img2dataset = _matching("warc", warc), _matching("img2dataset", img2dataset)
        self.folders = {start: Path(folder).resolve() for start, folder in (folders or {}).items()}
        for start, folder in self.folders.items():
            if not folder.is_dir():
                raise ConfigError(f"resolve.folders.{start}={folder} is not a folder.")
        self.drop_missing = drop_missing

    def inputs(self) -> list[tuple[str, int]]:
        return [(path, int(stamp[0])) for path, stamp in stamps([*self.warc, *self.img2dataset]).items()]

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        places = self._places()
        for document in documents:
            for node in wanted(document, retry=False):
                outcome = self._found(node["url"], places)
                self.count(outcome.status)
                settle(document, node, outcome)
            if self.drop_missing:
                without_missing(document)
            yield document

    def _found(self, url: str, places: np.ndarray) -> Outcome:
        for start, folder in self.folders.items():
            if url.startswith(start):
                path = (folder / unquote(urlsplit(url[len(start) :]).path).lstrip("/")).resolve()
                if path.is_relative_to(folder) and path.is_file():
                    return checked(path.read_bytes())
        first = int(np.searchsorted(places["url"], _hash(url)))
        while first < len(places) and places["url"][first] == _hash(url):
            if (outcome := self._read(url, places[first])) is not None:
                return outcome
            first += 1
        return Outcome("not_stored")

    def _read(self, url: str, place: Any) -> Outcome | None:
        """The image at a place; None if it is that of another URL with the same hash."""
        number, offset, length = int(place["file"]), int(place["offset"]), int(place["length"])
        if number >= len(self.warc):
            return checked(read_member(self.img2dataset[number - len(self.warc)], offset, length))
        path = self.warc[number]
        with opened(path) as file:
            record = read_pointer(file, Pointer(path, offset, length), _MAX_BYTES)
        if record.url != url:
            return None
        return Outcome(record.trouble) if record.trouble else checked(record.payload, record.status)

    def _places(self) -> np.ndarray:
        """Where the images are; in a pipeline one rank looks, and the others take what it found."""
        if self.place is None or not (self.warc or self.img2dataset):
            return self._looked_up()
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{INDEX}.lock"):
            if not (folder / INDEX).is_file():
                with aside(folder / INDEX) as file:
                    np.save(file, self._looked_up())
                fsync_folder(folder)
        return np.load(folder / INDEX, mmap_mode="r")

    def _looked_up(self) -> np.ndarray:
        rows: list[np.ndarray] = [np.empty(0, _PLACE)]
        for number, path in enumerate([*self.warc, *self.img2dataset]):
            found = images_of_shard(path) if number >= len(self.warc) else _images_of_warc(path)
            rows.append(np.array([(_hash(url), number, offset, length) for url, offset, length in found], _PLACE))
        return np.sort(np.concatenate(rows), order=["url", "file", "offset"])


def _images_of_warc(path: str) -> Iterator[tuple[str, int, int]]:
    for record in read_records(path, _MAX_BYTES):
        if not record.trouble and record.status == 200 and not record.content_type.startswith("text/"):
            yield record.url, record.pointer.offset, record.pointer.length


def _hash(url: str) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(url.encode("utf-8", "surrogatepass"))


def _matching(key: str, patterns: list[str] | None) -> list[str]:
    found = sorted({path for pattern in patterns or () for path in find_files(pattern)})
    if patterns and not found:
        raise ConfigError(f"resolve.{key}={patterns} matches no file.")
    return found
