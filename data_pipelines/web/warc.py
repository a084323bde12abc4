"""The step `warc`: pages of WARC files as documents whose text is their HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from datatrove.data import Document

from data_pipelines.frame.document import key_of, new_document
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import open_lines
from data_pipelines.web.charset import decode_page
from data_pipelines.web.records import Pointer, Record, opened, read_pointer, read_records
from m4train.data.storage.files import find_files, stamps
from m4train.errors import ConfigError, DataError

_HTML = ("text/html", "application/xhtml+xml")
_KEPT_HEADERS = ("x-robots-tag", "tdm-reservation", "tdm-policy", "content-language", "last-modified")
_EXAMPLE = 20  # records named a rank and kind of trouble


class ReadWarc(Step):
    """Pages of WARC files: whole files (`paths`, with globs), or the records that a list points to (`pointers`).

    Each rank has every N-th file, or its stretch of the list. Records that are damaged, cut off or too large are counted and named.
    """

    name = "warc"

    def __init__(
        self,
        paths: list[str] | str = (),  # type: ignore[assignment]
        pointers: str = "",
        root: str = "",
        max_bytes: int = 10_000_000,
        licence: str = "",
    ) -> None:
        """`pointers`: a .jsonl, .jsonl.gz or .parquet with warc_filename, warc_record_offset and warc_record_length; `root` is put before
        its file names. `max_bytes`: of a page, unpacked. `licence`: kept with every document."""
        super().__init__()
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        if bool(self.paths) == bool(pointers):
            raise ConfigError("warc needs either paths or pointers: warc.paths=['crawl/*.warc.gz']")
        self.pointers, self.root, self.max_bytes, self.licence = pointers, root, max_bytes, licence

    def inputs(self) -> list[tuple[str, int]]:
        files = self._files() if self.paths else [self.pointers]
        return [(path, int(stamp[0])) for path, stamp in stamps(files).items()]

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        yield from documents
        records = self._of_files(rank, world_size) if self.paths else self._of_pointers(rank, world_size)
        for record in records:
            if record.trouble:
                self._name(record)
            elif (document := self._document(record)) is not None:
                yield document

    def _files(self) -> list[str]:
        found = sorted({path for pattern in self.paths for path in find_files(pattern)})
        if not found:
            raise ConfigError(f"warc.paths={self.paths} matches no file.")
        return found

    def _of_files(self, rank: int, world_size: int) -> Iterator[Record]:
        for path in self._files()[rank::world_size]:
            yield from read_records(path, self.max_bytes)

    def _of_pointers(self, rank: int, world_size: int) -> Iterator[Record]:
        pointers = sorted(read_pointers(self.pointers, self.root), key=lambda one: (one.path, one.offset))
        mine = pointers[rank * len(pointers) // world_size : (rank + 1) * len(pointers) // world_size]
        for path, group in groupby(mine, key=lambda one: one.path):
            with opened(path) as file:
                for pointer in group:
                    yield read_pointer(file, pointer, self.max_bytes)

    def _name(self, record: Record) -> None:
        """Counts a record that cannot be used, and says where the first of them are."""
        self.count(record.trouble)
        named = self.ledger.examples.setdefault(record.trouble, [])
        if len(named) < _EXAMPLE:
            where = f"{record.pointer.path} at byte {record.pointer.offset}"
            named.append({"id": where, "url": record.url, "nodes": [], "media": []})

    def _document(self, record: Record) -> Document | None:
        if record.status != 200:
            self.count("not_status_200")
            return None
        if not is_html(record):
            self.count("not_html")
            return None
        text, encoding = decode_page(record.payload, record.charset)
        if not text.strip():
            self.count("empty")
            return None
        source = record.source()
        if self.licence:
            source["licence"] = self.licence
        key = key_of(record.url, record.date, source["warc_filename"], record.pointer.offset)
        document = new_document(key, record.url, source, text=text)
        document.metadata["charset"] = encoding
        headers = {name: record.header(name) for name in _KEPT_HEADERS}
        document.metadata["headers"] = {name: value for name, value in headers.items() if value}
        return document


def is_html(record: Record) -> bool:
    """Whether a response is a page, by its type, or by its first bytes if it has none."""
    if record.content_type:
        return record.content_type in _HTML
    return record.payload[:512].lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def read_pointers(path: str, root: str = "") -> list[Pointer]:
    """The pointers of a list. Raises DataError for a line without file, offset and length."""
    prefix = f"{root.rstrip('/')}/" if root else ""
    found = []
    for number, row in enumerate(_rows(path), 1):
        try:
            offset, length = int(row["warc_record_offset"]), int(row["warc_record_length"])
            found.append(Pointer(prefix + str(row["warc_filename"]), offset, length))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, row {number}: {type(error).__name__} {error}; it needs warc_filename, warc_record_offset and warc_record_length."
            ) from None
    return found


def _rows(path: str) -> Iterator[dict[str, Any]]:
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        for line in open_lines(Path(path)):
            row = json.loads(line)
            yield row.get("source", row)
