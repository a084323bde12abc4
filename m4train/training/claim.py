"""A run directory is trained by one run at a time: its claim is a lock that dies with the process that holds it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import IO

from m4train.errors import ConfigError
from m4train.run_files import CLAIM
from m4train.training.engines.base import Engine, agreed

_PATIENCE = 120.0  # seconds, in which ranks notice that those of a lost node are gone, and end


def claim(run_dir: Path, engine: Engine) -> IO[str] | None:
    """Claims a run directory for the processes of `engine` until the file that rank 0 gets is closed; all ranks call it.

    A claim whose process has died is taken over. A job of SLURM that was started again waits for what is left of its own earlier
    start on a node that SLURM has lost. Raises ConfigError on every rank, naming host and process, if another run holds it.
    """
    held: list[IO[str]] = []
    agreed(engine, lambda: held.append(_claimed(run_dir)))
    return held[0] if held else None


def _claimed(run_dir: Path) -> IO[str]:
    import fcntl

    file = (run_dir / CLAIM).open("a+", encoding="utf-8")
    job = f" of job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            if job and holder.endswith(job) and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            file.close()
            raise ConfigError(
                f"run_dir {run_dir} is being trained by {holder}: wait for it, end it, or choose another run_dir."
            ) from None
        except OSError:
            break  # a file system without locks
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n")
    file.flush()
    return file
