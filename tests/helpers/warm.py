"""Processes that start at once: forked from a server that has imported torch, peft, DeepSpeed and m4train, and done nothing else.

Importing these takes a process some ten seconds of CPU, which tests that start dozens of ranks would pay for each of them.
The server runs no thread and no operation of torch, so a child differs from a fresh process in nothing but its start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle

from tests.helpers import spares

EXPECTING = "M4TRAIN_TESTS_EXPECT"  # set: runs say what memory and time they expect, which takes longer than the steps of a test
ROOT = Path(__file__).parents[2]
PRELOADED = (
    "pytest",
    "peft",
    "deepspeed",
    "m4train.models",
    "m4train.commands.train",
    "m4train.training.trainer",
    "m4train.training.engines.ddp",
    "m4train.training.engines.deepspeed",
    "m4train.training.engines.fsdp",
    "tests.distributed.cases",
)


class Child:
    """A process of the server. `output` and `errors` are the files that hold what it wrote to stdout and stderr."""

    def __init__(self, pid: int, output: Path, errors: Path) -> None:
        self.pid, self.output, self.errors = pid, output, errors
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code; raises AssertionError with the output where it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s: {self.said()}"
            time.sleep(0.01)
        return code

    def signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:  # the server has not reaped it, so that the number is still its own
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Sends a signal to the process and to all it has started, as terminals, torchrun and SLURM do."""
        if self.poll() is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def said(self) -> str:
        """What it wrote to stdout, and to stderr."""
        files = dict.fromkeys((self.output, self.errors))
        return "".join(file.read_text(errors="replace") for file in files)


def start(
    function: Callable[..., Any],
    *args: Any,
    output: Path,
    errors: Path | None = None,
    folder: Path | None = None,
    ready: int = 0,
    **environment: str,
) -> Child:
    """Calls `function(*args)` in a new process, which ends with code 0, or 1 after an exception, or as SystemExit says.

    It writes to the files `output` and `errors` (None: the same one) and runs in `folder` (None: that of the tests). Of the
    processes that it starts with this interpreter, the first `ready` are warm, too.
    """
    work = cloudpickle.dumps((function, args))
    files = (output, errors or output)
    pid = _ask("start", work, {**os.environ, **environment}, str(folder or Path.cwd()), ready, *map(str, files))
    return Child(pid, *files)


def start_command(
    *arguments: str, folder: Path, ready: int = 1, terminal: str | None = None, **environment: str
) -> Child:
    """`m4train ARGUMENTS` in a process of its own; its output lies in `folder`, where it also runs, or goes to a terminal.

    By default the first process it starts, which is the server of its data processes, is warm.
    """
    if terminal is not None:
        place = Path(terminal)
        return start(_command, arguments, output=place, folder=folder, ready=ready, **environment)
    number = len(list(folder.glob("command-*.out")))
    output, errors = folder / f"command-{number}.out", folder / f"command-{number}.err"
    output.touch()
    return start(_command, arguments, output=output, errors=errors, folder=folder, ready=ready)


def _command(arguments: tuple[str, ...]) -> None:
    from m4train.cli import main

    sys.exit(main(list(arguments)))


@cache
def _server() -> Connection:
    ours, theirs = Pipe()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # CUDA would not survive the fork
    }
    command = [sys.executable, "-m", "tests.helpers.warm", str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait(timeout=60)))
    return ours


def _ask(*request: Any) -> Any:
    link = _server()
    link.send(request)
    return link.recv()


def _serve(link: Connection) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    _prepare()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in the fork"
    gc.collect()
    gc.freeze()  # or every collection of every child would walk, and so copy, all that was imported
    children: set[int] = set()
    try:
        while True:
            kind, *rest = link.recv()
            if kind == "start":
                pid = os.fork()
                if not pid:
                    link.close()
                    _become(*rest)
                children.add(pid)
                link.send(pid)
            else:
                done, status = os.waitpid(rest[0], os.WNOHANG)
                children.discard(done)
                link.send(os.waitstatus_to_exitcode(status) if done else None)
    except EOFError:  # the tests have ended, or were killed
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _prepare() -> None:
    """What every command would do again: looking for plugins of Hydra, and composing a first configuration."""
    from m4train.commands import train
    from m4train.config.compose import load_config
    from m4train.training.callbacks.base import Callback

    load_config(["experiment=digits_pretrain"])
    train.Expectation = Callback  # type: ignore[misc, assignment]


def _expect() -> None:
    from m4train.commands import train
    from m4train.estimation.expectation import Expectation

    train.Expectation = Expectation  # type: ignore[misc]


def _become(work: bytes, environment: dict[str, str], folder: str, own: int, *files: str) -> NoReturn:
    def call() -> None:
        import torch

        torch.set_num_threads(1)
        if EXPECTING in environment:
            _expect()
        function, args = cloudpickle.loads(work)
        if own:
            spares.keep(own, _end)
        function(*args)

    os.setpgid(0, 0)
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _end(call)


def _end(function: Callable[[], None]) -> NoReturn:
    """Calls the function, and ends the process as an interpreter would after it."""
    code: Any = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            from multiprocessing import util

            util._exit_function()  # ends the data processes of this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
