"""`m4train launch status|logs|stop|interrupt RUN`: following the jobs of a run on SLURM, and ending them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from m4train.commands.slurm_job import BAD_NODES, FOLDER, JOBS, LOGS
from m4train.deaths import died
from m4train.errors import ConfigError
from m4train.json_lines import OF_A_STEP, read_lines
from m4train.run_files import CHECKPOINTS, DEATHS, METRICS, newest_stage

_LINES = 20  # of each log
_FAILED = re.compile(r"^(Traceback|m4train train: |No progress for )", re.MULTILINE)


def status(arguments: Sequence[str]) -> int:
    """Prints the state of the jobs of a run, and how far it has come; returns 0."""
    run = _run("status", arguments)
    for job in _jobs(run):
        print(f"job {job}: {_state(job)}")
    trained = newest_stage(run)
    rows = read_lines(trained / METRICS, OF_A_STEP)
    held = sorted(path.name for path in (trained / CHECKPOINTS).glob("step-*"))
    loss = f", loss {rows[-1]['loss']:.4f}" if rows and "loss" in rows[-1] else ""
    print(f"{trained}: step {rows[-1]['step']}{loss}" if rows else f"{trained}: no step is logged yet")
    print(f"newest checkpoint: {held[-1] if held else 'none'}")
    if (bad := run / FOLDER / BAD_NODES).is_file():
        print(f"bad nodes: {', '.join(bad.read_text(encoding='utf-8').split())}")
    return 0


def logs(arguments: Sequence[str]) -> int:
    """Prints the last lines of every rank of the newest start of a run, first those of the rank that died last, then those of
    others that failed; returns 0."""
    run = _run("logs", arguments)
    named = run / FOLDER / LOGS
    folder = Path(named.read_text(encoding="utf-8").strip()) if named.is_file() else None
    found = (
        {path: path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("rank-*.log"))}
        if folder
        else {}
    )
    if not found:
        raise ConfigError(f"{run} has no logs of ranks yet: `m4train launch status {run}` says whether its job runs.")
    deaths = read_lines(newest_stage(run) / DEATHS, ("rank",))
    last = f"rank-{deaths[-1]['rank']}.log" if deaths else ""
    for path, text in sorted(found.items(), key=lambda item: (item[0].name != last, _FAILED.search(item[1]) is None)):
        print(f"== {path}")
        print(*text.splitlines()[-_LINES:], sep="\n")
    return 0


def say_died(outcome: str, rank: int) -> int:
    """Prints what is known of a rank that died; returns 0."""
    print(died(Path(outcome), rank) or "it had not begun")
    return 0


def stop(arguments: Sequence[str]) -> int:
    """Ends the jobs of a run, the one that runs with a checkpoint; returns 0."""
    run = _run("stop", arguments)
    live = _live(run)
    for job in live[1:] + [job for job in live[:1] if not _is_running(job)]:
        _slurm("scancel", job)
    for job in (job for job in live[:1] if _is_running(job)):
        _slurm("scancel", "--signal=USR1", job)
    print(f"told to stop: {', '.join(live)}")
    return 0


def interrupt(arguments: Sequence[str]) -> int:
    """Rehearses a preemption: the job that runs saves a checkpoint, goes back into the queue and continues; returns 0."""
    run = _run("interrupt", arguments)
    running = [job for job in _live(run) if _is_running(job)]
    if not running:
        raise ConfigError(f"no job of {run} is running: `m4train launch status {run}` shows them.")
    _slurm("scancel", "--signal=USR1", "--batch", running[0])
    print(f"told to wind up: {running[0]}")
    return 0


def _run(command: str, arguments: Sequence[str]) -> Path:
    """The run directory, as RUN or run_dir=RUN. Raises ConfigError if it has no job."""
    words = [argument.removeprefix("run_dir=") for argument in arguments]
    if len(words) != 1:
        raise ConfigError(f"launch {command} needs one run directory: m4train launch {command} RUN.")
    if not (Path(words[0]) / FOLDER / JOBS).is_file():
        raise ConfigError(
            f"{words[0]} holds no job of SLURM: `m4train launch slurm run_dir={words[0]} ...` submits one."
        )
    return Path(words[0])


def _jobs(run: Path) -> list[str]:
    return (run / FOLDER / JOBS).read_text(encoding="utf-8").split()


def check_alone(run: Path) -> None:
    """Raises ConfigError if a job of this run waits or runs: another one would be refused by it when it starts."""
    for job in _jobs(run) if (run / FOLDER / JOBS).is_file() else ():
        state = _state(job)
        if state not in ("ended", "") and not state.startswith("COMPLETING"):
            raise ConfigError(
                f"job {job} of this run is {state.split()[0]}: it goes on by itself; `m4train launch stop {run}` ends it, and "
                "launch.chain or --dependency=... submits jobs that follow each other."
            )


def _live(run: Path) -> list[str]:
    """The jobs of a run that wait or run, oldest first. Raises ConfigError if there is none."""
    live = [job for job in _jobs(run) if _state(job) != "ended"]
    if not live:
        raise ConfigError(f"no job of {run} waits or runs: {', '.join(_jobs(run))} ended.")
    return live


def _is_running(job: str) -> bool:
    return _state(job).startswith("RUNNING")


def _state(job: str) -> str:
    """State, time, nodes or reason of a job, as squeue says; `ended` if it no longer knows it."""
    done = subprocess.run(
        [_program("squeue"), "--noheader", f"--jobs={job}", "--format=%T %M %R"], capture_output=True, text=True
    )
    return done.stdout.strip() or "ended"


def _slurm(program: str, *words: str) -> None:
    done = subprocess.run([_program(program), *words], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{program} refused: {' '.join((done.stderr or done.stdout).split())}.")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not on the PATH: this works where jobs are submitted.")
    return found
