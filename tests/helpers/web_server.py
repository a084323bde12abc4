"""A web server on loopback that behaves as badly as asked, for tests of what fetches."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """What a server answers by path, and what it was asked: path -> (status, headers, body) or a function of the handler."""

    def __init__(self):
        self.pages, self.asked, self.times = {}, Counter(), []
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self.agents = set()

    def add(self, path, body=b"", status=200, **headers):
        self.pages[path] = (status, {name.replace("_", "-").title(): value for name, value in headers.items()}, body)


@contextlib.contextmanager
def running(site):
    """The address of a server for the site."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            with site.lock:
                site.asked[self.path] += 1
                site.times.append((self.path, time.monotonic()))
                site.at_once += 1
                site.most_at_once = max(site.most_at_once, site.at_once)
                site.agents.add(self.headers.get("User-Agent"))
            try:
                page = site.pages.get(self.path, (404, {}, b""))
                page = page(self) if callable(page) else page
                if page is not None:
                    status, headers, body = page
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with site.lock:
                    site.at_once -= 1

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
