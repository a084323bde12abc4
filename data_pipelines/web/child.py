"""The process that parses pages, and its other end. A page may kill it: that page is known then, and the next is given to another one.

A request is the lengths of the URL and the page and then both, in UTF-8 as the parser takes them; an answer is the length of a pickle and
then that: what `page.extract` returns, or the words of an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import resource
import select
import struct
import subprocess
import sys
import time
from typing import IO, Any

_REQUEST, _ANSWER = struct.Struct("<IQ"), struct.Struct("<Q")
_PIPE = 1 << 20  # bytes of a pipe: with the usual 64 KB both ends take turns several times a page
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
            page, address = html.encode("utf-8", "ignore"), url.encode("utf-8", "ignore")
            self._process.stdin.write(_REQUEST.pack(len(address), len(page)) + address + page)
            self._process.stdin.flush()
            answer = _received(self._process.stdout, time.monotonic() + self.seconds)
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
            [sys.executable, "-m", "data_pipelines.web.child", str(self.max_width)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # more than this user may have
                fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE)  # type: ignore[arg-type]
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


def _received(stream: IO[bytes], deadline: float) -> Any:
    """The next answer. Raises EOFError if the other end is gone, TimeoutError after the deadline."""
    size = _ANSWER.unpack(_exactly(stream.fileno(), _ANSWER.size, deadline))[0]
    return pickle.loads(_exactly(stream.fileno(), size, deadline))


def _exactly(descriptor: int, size: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while size:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(descriptor, size)
        if not part:
            raise EOFError
        size -= len(part)
        parts.append(part)
    return b"".join(parts)


def serve(max_width: int) -> None:
    """Answers requests until there are no more."""
    from data_pipelines.web.page import extract

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed is taken for an answer
    requests = sys.stdin.buffer
    while head := requests.read(_REQUEST.size):
        of_url, of_page = _REQUEST.unpack(head)
        url, html = requests.read(of_url).decode(), requests.read(of_page)
        try:
            answer: Any = extract(html, url, max_width)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:500]
        data = pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
        answers.write(_ANSWER.pack(len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
