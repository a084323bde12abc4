"""The process that parses pages, and its other end. A page may kill it: that page is known then, and the next is given to another one.

Requests and answers are pickles with their length before them: (html, url, max_width), and what `page.extract` returns or the words
of an error.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import struct
import subprocess
import sys
import time
from typing import IO, Any

_HEAD = struct.Struct("<Q")
_RECYCLE = 20_000  # pages, after which a fresh process takes over: parsers have leaked before
_MEMORY = 4 << 30  # bytes of address space


class PageLost(Exception):
    """A page that no nodes could be made of; the reason is a word: parser_crash, parser_timeout or parser_error."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Parser:
    """Extracts pages in a process of its own, which is started again if it dies or takes too long."""

    def __init__(self, max_width: int, seconds: float) -> None:
        self.max_width, self.seconds = max_width, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pages = 0

    def extract(self, html: str, url: str) -> dict[str, Any]:
        """As `page.extract`. Raises PageLost if the page killed the process, took longer than `seconds`, or was refused."""
        if self._process is None or self._pages >= _RECYCLE:
            self._restart()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pages += 1
        try:
            _send(self._process.stdin, (html, url, self.max_width))
            answer = _receive(self._process.stdout, time.monotonic() + self.seconds)
        except TimeoutError:
            self.close()
            raise PageLost("parser_timeout", f"it took more than {self.seconds:g} seconds") from None
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            self.close()
            raise PageLost("parser_crash", f"the parser ended with {code}") from None
        if isinstance(answer, str):
            raise PageLost("parser_error", answer)
        return answer

    def _restart(self) -> None:
        self.close()
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_pipelines.web.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self._pages = 0

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # it died before it read what was buffered
                        stream.close()
            process.wait()


def _send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_HEAD.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes], deadline: float | None = None) -> Any:
    size = _HEAD.unpack(_exactly(stream, _HEAD.size, deadline))[0]
    return pickle.loads(_exactly(stream, size, deadline))


def _exactly(stream: IO[bytes], size: int, deadline: float | None) -> bytes:
    """So many bytes. Raises EOFError if the other end is gone, TimeoutError after the deadline."""
    descriptor = stream.fileno()
    data = bytearray()
    while len(data) < size:
        if deadline is not None and not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(descriptor, size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def serve() -> None:
    """Answers requests until there are no more."""
    from data_pipelines.web.page import extract

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed is taken for an answer
    requests = sys.stdin.buffer
    while True:
        try:
            html, url, max_width = _receive(requests)
        except EOFError:
            return
        try:
            answer: Any = extract(html, url, max_width)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:500]
        _send(answers, answer)


if __name__ == "__main__":
    serve()
