"""Downloads: http only, limited in size and time, and never from the own network unless that is allowed."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from m4train.downloads import ALLOW_PRIVATE, DownloadError, fetch
from m4train.errors import BadSample, ConfigError, without_secrets
from m4train.processing.inputs import read_image
from tests.helpers.data import page_picture, png

PICTURE = png(page_picture("a"))


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(600):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.wfile.write(PICTURE if self.path == "/a.png" else bytes(200_000))

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_PRIVATE, "1")


def test_a_file_is_fetched_where_that_is_allowed(site: str, allowed: None) -> None:
    assert fetch(f"{site}/a.png", 10_000, 5) == PICTURE
    assert fetch(f"{site}/to/{site}/a.png", 10_000, 5) == PICTURE
    assert read_image(f"{site}/a.png").size == page_picture("a").size


@pytest.mark.parametrize(
    "path", ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://127.0.0.1/", "data:,a", "//127.0.0.1/a", "a.png"]
)
def test_only_http_is_fetched(path: str, site: str, allowed: None) -> None:
    with pytest.raises(DownloadError, match="only http and https"):
        fetch(path, 1000, 5)
    if "://" in path:
        with pytest.raises(DownloadError, match=r"only http and https|is not allowed"):
            fetch(f"{site}/to/{path}", 1000, 5)


@pytest.mark.parametrize("path", ["/big", "/slow", "/gone"])
def test_limits(path: str, site: str, allowed: None) -> None:
    begun = time.monotonic()
    with pytest.raises(DownloadError, match=r"more than 1000 bytes|more than 0\.5 seconds|404"):
        fetch(f"{site}{path}", 1000, 0.5)
    assert time.monotonic() - begun < 30  # 600 bytes at their own pace take 60 seconds


def test_redirects_in_a_circle_end(site: str, allowed: None) -> None:
    with pytest.raises(DownloadError):
        fetch(f"{site}/to/{site}/to/{site}/to/{site}/to/{site}/to/{site}/to/{site}/to/{site}/a.png", 10_000, 5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0.0.0.0", "127.1"])
def test_the_own_machine_is_refused(host: str, site: str) -> None:
    port = site.rpartition(":")[2]
    with pytest.raises(DownloadError, match=r"own machine or network|refused|unreachable|not known|resolve|assign"):
        fetch(f"http://{host}:{port}/a.png", 10_000, 5)


def test_nothing_is_sent_to_an_address_that_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(DownloadError, match=ALLOW_PRIVATE):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/delete-all", 1000, 5)
        connection, _ = server.accept()
        assert connection.recv(100) == b""


def test_passwords_reach_no_message() -> None:
    secret = "s3://me:hunter2@store/a.tar and https://x:hunter2@y/z?a=b"
    assert "hunter2" not in without_secrets(secret)
    assert "store/a.tar" in without_secrets(secret)
    assert "hunter2" not in str(ConfigError(secret))
    assert "hunter2" not in BadSample("unreachable_image", secret).detail
    assert without_secrets("at 12:30 see http://host:80/a@b") == "at 12:30 see http://host:80/a@b"
