"""WARC files for tests, written by warcio, which is not what reads them here."""

from __future__ import annotations

import io
from collections.abc import Iterable

from warcio.archiveiterator import ArchiveIterator
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter


def record(writer, url, payload, *headers, status="200 OK", kind="response", date="2026-01-02T03:04:05Z", length=None):
    content_type = () if any(name == "Content-Type" for name, _ in headers) else (("Content-Type", "text/html"),)
    size = (("Content-Length", str(len(payload) if length is None else length)),)
    http = StatusAndHeaders(status, [*content_type, *headers, *size], protocol="HTTP/1.1")
    made = writer.create_warc_record(
        url, kind, payload=io.BytesIO(payload), http_headers=http, warc_headers_dict={"WARC-Date": date}
    )
    writer.write_record(made)


def warc_of(pages: Iterable[tuple], gzip: bool = True) -> bytes:
    """A WARC file with a warcinfo record and a response for each (url, payload, *headers)."""
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=gzip)
    writer.write_record(writer.create_warcinfo_record("test.warc.gz", {"software": "tests"}))
    for url, payload, *headers in pages:
        record(writer, url, payload, *headers)
    return buffer.getvalue()


def read_by_warcio(data: bytes) -> dict[str, bytes]:
    """URL -> payload of every response, as warcio reads them; it ends where it can read no further."""
    found = {}
    try:
        for one in ArchiveIterator(io.BytesIO(data)):
            if one.rec_type == "response":
                found[one.rec_headers.get_header("WARC-Target-URI")] = one.content_stream().read()
    except Exception:  # whatever damage makes of it
        pass
    return found
