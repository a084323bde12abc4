"""The HTTP responses in WARC files, parsed by fastwarc, each by itself; what cannot be used is named."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from data_pipelines.web.members import Cut, cuts
from m4train.data.storage.files import is_remote
from m4train.errors import DataError

_TARGET = re.compile(rb"\r?\nwarc-target-uri:[ \t]*<?([^\r\n>]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Pointer:
    """Where a record is: `length` bytes at `offset` of a file."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Record:
    """One HTTP response, or trouble."""

    pointer: Pointer
    url: str = ""
    date: str = ""
    status: int = 0
    content_type: str = ""  # without parameters, in small letters
    charset: str | None = None  # of the HTTP header
    headers: tuple[tuple[str, str], ...] = ()  # of HTTP, names in small letters
    payload: bytes = b""  # without transfer and content encodings
    trouble: str = ""  # damaged, truncated, too_large, or nothing

    def header(self, name: str) -> str:
        """All values of a header, with commas between them."""
        return ", ".join(value for key, value in self.headers if key == name)

    def source(self) -> dict[str, Any]:
        """What a document keeps of where it is from."""
        return {
            "warc_filename": self.pointer.path
            if is_remote(self.pointer.path)
            else PurePosixPath(self.pointer.path).name,
            "warc_record_offset": self.pointer.offset,
            "warc_record_length": self.pointer.length,
            "date": self.date,
        }


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file, local or of any store that fsspec knows, to be read by ranges."""
    if is_remote(path):
        import fsspec

        with fsspec.open(path, "rb") as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def read_records(path: str, max_bytes: int) -> Iterator[Record]:
    """The responses of a whole file, in order, and what is damaged. Raises DataError if it cannot be read at all."""
    with _named(path), opened(path) as file:
        for cut in cuts(file, max_bytes):
            if (record := _record(cut, path, max_bytes)) is not None:
                yield record


def read_pointer(file: BinaryIO, pointer: Pointer, max_bytes: int) -> Record:
    """The response that a pointer leads to; trouble if there is another thing at that place."""
    with _named(pointer.path):
        file.seek(pointer.offset)
        stored = file.read(pointer.length)
        cut = next(iter(cuts(io.BytesIO(stored), max_bytes)), None)
        if cut is None:
            return Record(pointer, trouble="truncated")
        found = _record(cut._replace(offset=pointer.offset, length=pointer.length), pointer.path, max_bytes)
        return found or Record(pointer, trouble="no_response")


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{path} cannot be read as a WARC file: {error}") from None


def _record(cut: Cut, path: str, max_bytes: int) -> Record | None:
    """A response, trouble, or None for a record of another kind."""
    pointer = Pointer(path, cut.offset, cut.length)
    if cut.trouble:
        target = _TARGET.search(cut.data[: 64 << 10])
        return Record(pointer, url=target[1].decode("utf-8", "replace") if target else "", trouble=cut.trouble)
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    try:
        for parsed in ArchiveIterator(io.BytesIO(cut.data), parse_http=False):
            if parsed.record_type != WarcRecordType.response:
                return None
            if not _digest_fits(parsed):
                return Record(pointer, url=_url(parsed), trouble="damaged")
            return _response(parsed, pointer, max_bytes)
    except (OSError, ValueError):
        pass
    target = _TARGET.search(cut.data[: 64 << 10])
    return Record(pointer, url=target[1].decode("utf-8", "replace") if target else "", trouble="damaged")


def _digest_fits(parsed: Any) -> bool:
    """Whether the block is what it was when it was written, if the record has a digest that can be compared."""
    digest = str(parsed.headers.get("WARC-Block-Digest") or "")
    return not digest.lower().startswith(("sha1:", "sha256:", "md5:")) or bool(parsed.verify_block_digest())


def _url(parsed: Any) -> str:
    return str(parsed.headers.get("WARC-Target-URI") or "").strip("<> ")


def _response(parsed: Any, pointer: Pointer, max_bytes: int) -> Record:
    url, date = _url(parsed), str(parsed.headers.get("WARC-Date") or "")
    parsed.parse_http(auto_decode="all")
    headers = tuple((str(name).lower(), str(value)) for name, value in (parsed.http_headers or ()))
    status = int(parsed.http_headers.status_code or 0) if parsed.http_headers is not None else 0
    encoded = any(name in ("content-encoding", "transfer-encoding") for name, _ in headers)
    payload = parsed.reader.read(max_bytes + 1)
    declared = next((value.strip() for name, value in headers if name == "content-length"), "")
    short = not encoded and declared.isdigit() and len(payload) < int(declared)
    trouble = "too_large" if len(payload) > max_bytes else "truncated" if short else ""
    return Record(
        pointer,
        url=url,
        date=date,
        status=status,
        content_type=str(parsed.http_content_type or "").partition(";")[0].strip().lower(),
        charset=parsed.http_charset,
        headers=headers,
        payload=b"" if trouble == "too_large" else payload,
        trouble=trouble,
    )
