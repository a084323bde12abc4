"""What the seconds between a command and its first optimizer step go into. Light: it is there before anything else is imported."""

from __future__ import annotations

import os
import time

BEGAN = "M4TRAIN_BEGAN"  # when the command began that launched this process, in seconds since 1970
_PARTS = {  # what the stages of a run count as; others go on with the part before
    "index": "index",
    "checkpoint": "checkpoint",
    "data": "data",
    "model": "model",
    "start": "engine",
    "callbacks": "callbacks",
    "fetch": "first batch",
    "worst batch": "first step",
    "forward": "first step",
}


class _Clock:
    """Seconds of each part since the command began; stopped until a command starts it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.part: str | None = None
        self.since = 0.0

    def enter(self, part: str | None) -> None:
        now = time.time()
        if self.part is not None:
            self.spent[self.part] = self.spent.get(self.part, 0.0) + now - self.since
        self.part, self.since = part, now


_clock = _Clock()


def command(part: str) -> None:
    """Starts the clock of a command, which began with this process, or with the one that launched it; now it does `part`."""
    _clock.spent = {}
    own = _own_start()
    began = float(os.environ.get(BEGAN, own))
    if began < own:
        _clock.spent["launch"] = own - began
    _clock.part, _clock.since = "python", own
    _clock.enter(part)


def began() -> float:
    """When this command began, in seconds since 1970, for the processes that it launches."""
    return float(os.environ.get(BEGAN, _own_start()))


def _own_start() -> float:
    """When this process began; where the system does not say, now."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since the machine was started
    except OSError:
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def stage(name: str) -> None:
    """A stage of the run begins, as the heartbeat calls it, or a part; nothing happens if no clock runs."""
    if _clock.part is not None:
        _clock.enter(_PARTS.get(name, _clock.part))


def enter(part: str) -> None:
    """Another part begins."""
    if _clock.part is not None:
        _clock.enter(part)


def ended() -> dict[str, float]:
    """The first step is done: seconds of each part, in order; empty the next time, and without a command."""
    _clock.enter(None)
    spent, _clock.spent = _clock.spent, {}
    return spent


def line(spent: dict[str, float]) -> str:
    """One line for a person."""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items() if seconds >= 0.05)
    return f"start-up {sum(spent.values()):.1f} s: {parts}"
