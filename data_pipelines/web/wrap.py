"""A folder of a web site as a WARC file, and served on loopback: real pages to try a pipeline on without a crawl.

python -m data_pipelines.web.wrap FOLDER OUT.warc.gz [http://docs.example/]
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import mimetypes
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from urllib.parse import quote

from data_pipelines.frame.store import aside
from m4train.errors import DataError

BASE = "http://docs.example/"
DATE = "2026-01-01T00:00:00Z"  # of every record, so that the same folder gives the same bytes


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server on loopback that serves the folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wrap(folder: Path, path: Path, base: str = BASE, pages_only: bool = False) -> int:
    """Writes a response for every page, and unless `pages_only` every image, of a folder, in the order of names, as if `base`
    had served it; returns how many. Raises DataError if there is no page."""
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    kinds = {one: mimetypes.guess_type(one.name)[0] or "" for one in files}
    wanted = [one for one in files if kinds[one] == "text/html" or (not pages_only and kinds[one].startswith("image/"))]
    if not any(kinds[one] == "text/html" for one in wanted):
        raise DataError(f"{folder} holds no page (*.html): give the folder of a web site.")
    with aside(path) as file:
        for one in wanted:
            url = base + quote(one.relative_to(folder).as_posix())
            _write(file, url, kinds[one], one.read_bytes())
    return len(wanted)


def _write(file: IO[bytes], url: str, kind: str, content: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    block = head.encode() + content
    name = uuid.UUID(hashlib.sha256(url.encode()).hexdigest()[:32])
    fields = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:uuid:{name}>",
        "WARC-Date": DATE,
        "WARC-Target-URI": url,
        "Content-Type": "application/http; msgtype=response",
        "Content-Length": str(len(block)),
    }
    header = "WARC/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in fields.items()) + "\r\n"
    file.write(gzip.compress(header.encode() + block + b"\r\n\r\n", compresslevel=6, mtime=0))


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3):
        print("usage: python -m data_pipelines.web.wrap FOLDER OUT.warc.gz [http://docs.example/]", file=sys.stderr)
        return 2
    try:
        count = wrap(Path(arguments[0]), Path(arguments[1]), arguments[2] if len(arguments) > 2 else BASE)
    except (DataError, OSError) as error:
        print(f"wrap: {error}", file=sys.stderr)
        return 1
    print(f"{count} responses in {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
