"""Object stores on loopback: an HTTP server that honours ranges, counts requests and can fail, and S3."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class HttpStore(ThreadingHTTPServer):
    """Serves `folder`. `ranges` holds (path, first byte, bytes) of every GET answered, `asked` the method and path of every request; the
    next `failures` GETs of files fail with status 503, all of them while `broken`; `deaf` to ranges it sends whole files; every
    answer takes `latency` seconds."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.ranges: list[tuple[str, int, int]] = []
        self.failures = 0
        self.asked: list[str] = []
        self.latency = 0.0
        self.broken = self.deaf = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a reader that goes away is no fault of the store
            super().handle_error(request, client_address)

    def bytes_sent(self, name: str) -> int:
        return sum(size for path, _, size in self.ranges if path.endswith(name))


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpStore

    def do_HEAD(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        time.sleep(self.server.latency)
        super().do_HEAD()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self.server.asked.append(f"{self.command} {self.path}")
        time.sleep(self.server.latency)
        if path.is_dir():
            super().do_GET()
            return
        if self.server.broken or self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, size - 1
        if asked and not self.server.deaf:
            first, last = int(asked[1]), min(last, int(asked[2] or last))
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
        self.send_response(206 if asked and not self.server.deaf else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        self.server.ranges.append((self.path, first, last - first + 1))  # before whoever asked can know
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def http_store(folder: Path) -> Iterator[HttpStore]:
    """A store that serves `folder` until the end of the block."""
    with HttpStore(folder) as store:
        thread = threading.Thread(target=store.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield store
        finally:
            store.shutdown()
            thread.join()
