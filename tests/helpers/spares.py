"""Processes kept ready for what a warm process starts with an interpreter of its own: ranks, and servers of data processes.

A spare is forked while its parent runs no thread, and is its child as the process would be that it takes the place of: it has
that one's exit code, and the file descriptors, environment, folder and session of that start, and signals reach it. It only has
done the imports already. What ends with an interpreter (threads that abort it) is seen in real processes alone.
"""

from __future__ import annotations

import _posixsubprocess
import fcntl
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_SPARES: list[tuple[int, socket.socket]] = []
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ABOVE = 512  # more descriptors than any of these processes has
_fork_exec = _posixsubprocess.fork_exec


def keep(count: int, end: Callable[[Callable[[], None]], NoReturn]) -> None:
    """Forks `count` spares, and starts one of them wherever this process would start its own interpreter.

    `end(function)` calls a function as the whole work of a process, and ends the process as it ends.
    """
    for _, link in _SPARES:  # those of the process that this one was forked from
        link.close()
    _SPARES.clear()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # a spare is deaf from its first moment on
    for _ in range(count):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            for _, link in [*_SPARES, (0, ours)]:
                link.close()
            _SPARES.clear()
            _stand_by(theirs, end)
        theirs.close()
        _SPARES.append((pid, ours))
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    subprocess._fork_exec = _posixsubprocess.fork_exec = _start  # type: ignore[attr-defined]


def _start(*request: Any) -> int:
    """Takes the place of `fork_exec`, through which both subprocess and multiprocessing start programs."""
    args, _, _, kept, folder, environment, stdin, _, _, stdout, _, stderr, _, error, _, session, group = request[:17]
    words = [os.fsdecode(word) for word in args]
    preexec = request[-2]
    if not _SPARES or preexec is not None or words[0] != sys.executable or "resource_tracker" in words[-1]:
        return _fork_exec(*request)
    pid, link = _SPARES.pop()
    numbers = [0, 1, 2, *(fd for fd in kept if fd > 2 and fd != error)]
    fds = [own if fd == -1 else fd for own, fd in enumerate((stdin, stdout, stderr))] + numbers[3:]
    values = dict(os.environ) if environment is None else dict(os.fsdecode(one).split("=", 1) for one in environment)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    place = os.fspath(folder) if folder is not None else os.getcwd()
    socket.send_fds(link, [b"."], fds)
    link.sendall(pickle.dumps((words, values, place, numbers, session, group, mask)))
    link.close()
    return pid


def _stand_by(link: socket.socket, end: Callable[[Callable[[], None]], NoReturn]) -> NoReturn:
    """Waits, deaf to what asks the parent to stop, until it is started; ends where the parent has ended."""
    called, fds, _, _ = socket.recv_fds(link, 1, 64)
    if not called:
        os._exit(0)
    words, environment, folder, numbers, session, group, mask = pickle.loads(
        b"".join(iter(lambda: link.recv(1 << 16), b""))
    )
    link.detach()
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD, _ABOVE) for fd in fds]
    os.closerange(3, _ABOVE)
    for fd, number in zip(above, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    if session:
        os.setsid()
    if group not in (None, -1):
        os.setpgid(0, group)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number in _STOPS:  # one that came meanwhile was meant for the parent
        before = signal.signal(number, signal.SIG_IGN)
        signal.signal(number, before)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    serves = "multiprocessing" in words[-1]
    keep(0 if serves else 1, end)
    end(lambda: _interpret(words[1:]))


def _interpret(words: list[str]) -> None:
    """Does what `python WORDS` does."""
    while words[0] in ("-B", "-u", "-s", "-E"):
        words = words[1:]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")
