"""Runs as they go on, served to a browser of this machine: a page of one run, or of several over each other."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from m4train.errors import M4Error
from m4train.inspection.compare import compare, compare_page
from m4train.inspection.report import report_page
from m4train.run_files import ANSWERS, CONFIG, EVALUATION, METRICS, PARAMETERS, QUARANTINE, SAMPLES

LOOPBACK = "127.0.0.1"
_FILES = (CONFIG, METRICS, PARAMETERS, QUARANTINE, SAMPLES, EVALUATION, ANSWERS)


def state(folders: Sequence[Path]) -> str:
    """Changes when a file of a run that the page shows does."""
    stamps = []
    for path in (folder / name for folder in folders for name in _FILES):
        stat = path.stat() if path.is_file() else None
        stamps.append(stat and (stat.st_mtime_ns, stat.st_size))
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def live_page(folders: Sequence[Path]) -> str:
    """The report of one run, or the curves of several over each other, as they are now."""
    now = state(folders)
    if len(folders) == 1:
        return report_page(folders[0], now)
    found, runs = compare(list(folders), "loss", "min", must=False)
    return compare_page(found, runs, "loss", now)


def server(folders: Sequence[Path], port: int) -> tuple[ThreadingHTTPServer, str]:
    """A server on the loopback and the address that it answers at, which holds a token; port 0 takes a free one.

    Raises OSError for a port that is taken.
    """
    token = secrets.token_urlsafe(16)

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            given, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
            known = hmac.compare_digest(given.encode(), token.encode()) and host in (LOOPBACK, "localhost")
            if not known or name not in ("", "page", "state"):
                self._answer(
                    404, "text/plain", "Not found: the address that `m4train watch` printed has a token in it."
                )
                return
            try:
                body = state(folders) if name == "state" else live_page(folders)
            except (M4Error, OSError) as error:  # files that are being written
                self._answer(503, "text/plain", str(error))
                return
            self._answer(200, "text/plain" if name == "state" else "text/html", body)

        def _answer(self, status: int, kind: str, body: str) -> None:
            data = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal is for the address."""

    made = ThreadingHTTPServer((LOOPBACK, port), Pages)
    made.daemon_threads = True
    return made, f"http://{LOOPBACK}:{made.server_address[1]}/{token}/"
