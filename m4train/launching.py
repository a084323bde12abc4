"""Several processes for one command: `launch.processes=N` starts them here; torchrun and SLURM start them from outside.

Nothing heavy is imported before processes are started: a configuration that cannot work is answered first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from m4train import exits, scratch, startup
from m4train.config import Config
from m4train.deaths import died
from m4train.errors import ConfigError, TrainingError
from m4train.run_files import CHECKPOINTS
from m4train.terminal import leave_terminal, stage

LOGS = "M4TRAIN_LOGS"  # the folder in which the processes of one launch keep what they say
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def launched() -> bool:
    """Whether this process was started as one of a group, by this module, torchrun or a SLURM script."""
    return "WORLD_SIZE" in os.environ


def starts_processes(config: Config) -> bool:
    """Whether this process has to start those of launch.processes; one that was launched itself is one of them."""
    return not launched() and (config.launch.processes or 1) > 1


def check_launched(config: Config) -> None:
    """Refuses, in every process that was launched, what does not fit the group it belongs to.

    Raises ConfigError for several processes under engine=single, and for another number of them than launch.processes.
    """
    if not launched():
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            raise ConfigError(
                "RANK and MASTER_ADDR are set, but WORLD_SIZE is not: set it, or unset them to train on one process."
            )
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdigit():
            raise ConfigError(f"{name} is {os.environ[name]!r}, but must be a whole number.")
    world_size = int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size > 1 and config.engine.name == "single":
        raise ConfigError(
            f"engine.name is single, but {world_size} processes were started, each of which would do the whole work: "
            "choose engine=ddp, fsdp2 or zero1 to zero3, or start one process."
        )
    if config.launch.processes not in (None, here):
        raise ConfigError(
            f"launch.processes is {config.launch.processes}, but {here} processes were started on this machine: "
            "leave launch.processes out if torchrun or SLURM starts them."
        )


def keep_log() -> None:
    """Keeps what this process says in `run_dir/logs/rank-N.log` as well, if `launch` started it."""
    folder = os.environ.get(LOGS)
    if not folder or not launched():
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"rank-{int(os.environ['RANK'])}.log"
    log = path.open("a", encoding="utf-8", errors="replace", buffering=1)
    streams: Any = (_Both(sys.stdout, log), _Both(sys.stderr, log))
    sys.stdout, sys.stderr = streams


class _Both:
    """A stream of this process, whose whole lines go to a log as well, without what only moves the cursor of a terminal."""

    def __init__(self, stream: Any, log: TextIO) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            shown = _CONTROL.sub("", line).rpartition("\r")[2]
            if shown.strip() or not line:
                self._log.write(shown.rstrip() + "\n")
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def check_devices(processes: int) -> None:
    """Raises ConfigError if this machine has GPUs, but fewer than `processes`."""
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ConfigError(
            f"{processes} processes on this machine, but it has {torch.cuda.device_count()} GPUs, and every process needs "
            "one of its own: lower launch.processes (or --nproc_per_node), or set CUDA_VISIBLE_DEVICES= to train on the CPU."
        )


def launch(arguments: list[str], processes: int, run_dir: Path) -> int:
    """Runs `m4train ARGUMENTS` on `processes` processes of this machine through torch's elastic launcher; returns what they would
    return as one.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on, and the processes decide what they mean. If one fails, the others are
    ended. Raises TrainingError that names the first to fail, or ConfigError if it refused the configuration.
    """
    check_devices(processes)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the error below says it once
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        run_id=f"m4train-{os.getpid()}",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # the others are passed on, so that the run ends with a checkpoint
    )
    os.environ[LOGS] = str(run_dir / "logs")
    os.environ[startup.BEGAN] = str(startup.began())
    stage(None)  # from here on the processes say what they do
    with _signals_passed_on(), scratch.launching(), tempfile.TemporaryDirectory(prefix="m4train-") as folder:
        outcome, os.environ[exits.FOLDER] = Path(folder), folder
        try:
            elastic_launch(settings, sys.executable)("-m", "m4train", *arguments)
        except ChildFailedError as error:
            # A rank that was killed comes first: those that waited for it may be seen to end in the same moment.
            failures = sorted(error.failures.items(), key=lambda found: (found[1].exitcode > 0, found[1].timestamp))
            rank, failure = failures[0]
            if failure.exitcode == -signal.SIGINT:  # before it could say so
                raise KeyboardInterrupt from error
            if failure.exitcode in (exits.REFUSED, exits.INTERRUPTED) and exits.has_said(outcome):
                return failure.exitcode
            said, continues = exits.has_said(outcome), arguments[0] == "train"
            where = died(outcome, rank) if continues and failure.exitcode != exits.HUNG else ""
            raise _explain(rank, failure.exitcode, said, where, run_dir if continues else None) from error
        finally:
            del os.environ[exits.FOLDER], os.environ[LOGS], os.environ[startup.BEGAN]
        return exits.STOPPED_EARLY if exits.has_stopped_early(outcome) else exits.COMPLETE


def _explain(rank: int, code: int, said: bool, where: str, run_dir: Path | None) -> TrainingError:
    """The last line: who ended first, `where` it was, and what the same command would do; `run_dir` of a run that trains."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    text = f"process {rank} {how} and the others were stopped{'; ' if where else ''}{where}"
    if said and code > 0:  # what others say of one that was killed is not why
        return TrainingError(f"{text}; the reason is above.")
    if run_dir is None:
        return TrainingError(f"{text}.")
    if any((run_dir / CHECKPOINTS).glob("step-*")):
        return TrainingError(f"{text}; the same command continues the run.")
    return TrainingError(f"{text} before there was a checkpoint; the same command starts the run again.")


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Sends what this process is asked to the processes it started, which are in sessions of their own."""
    import psutil

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        children = psutil.Process().children()
        if not children:  # nobody could hear it
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    heard = [number for number in exits.STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup asks
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
