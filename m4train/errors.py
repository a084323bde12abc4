"""The errors a user can act on. Each message is one sentence: what is wrong with which value, where, and what to do."""

from __future__ import annotations

import errno
import io
import os
import re
import traceback
from typing import Any

_SECRET = re.compile(r"(?<=://)[^/@\s'\"]*:[^/@\s'\"]*(?=@)")


def without_secrets(text: str) -> str:
    """The text without the names and passwords that URLs in it carry (`scheme://NAME:PASSWORD@host`)."""
    return _SECRET.sub("***", text)


class M4Error(Exception):
    """Base of every error m4train raises on purpose; the command line prints its message without a traceback.

    Passwords in URLs are left out of every message.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(str(message)))


class ConfigError(M4Error):
    """A configuration key, type or combination that cannot work."""


class DataError(M4Error):
    """Shards, an index or a plan that cannot be used as they are (not a single bad sample: see BadSample)."""


class WrongArgument(DataError, ValueError):
    """An argument of a call that cannot be, as Python and transformers call it."""


class StaleIndexError(DataError):
    """An index that does not describe its shards, or was made for another processor."""


# Reasons of samples that are left out because the configuration or the sample says so, not because they are bad.
CHOICES = frozenset({"too_long", "skipped", "not_preferred", "not_learnt", "taken_down"})


class BadSample(M4Error):
    """One sample that cannot be used: it is dropped from its pack, named in the quarantine file and counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = str(self)

    def __reduce__(self) -> tuple:
        return (BadSample, (self.reason, self.detail))


class CheckpointError(M4Error):
    """A checkpoint or model folder that cannot be written, read back, or used with this run."""


class TrainingError(M4Error):
    """A run that must stop: persistent non-finite loss, a parameter without gradient, a rank that hangs."""


def of_the_system(error: Exception) -> str | None:
    """A sentence on what the operating system refused: its own word for it, such as "No space left on device", the path, and
    what to do. None for an error that is not of that kind, as a defect of this program is."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = error.filename if isinstance(error.filename, (str, bytes)) else _being_written(error)
    if path is None:
        return None
    advice = _ADVICE.get(error.errno, "look at that path")
    return f"{error.strerror}: {os.fsdecode(path)}; {advice}, and run the same command again."


def _being_written(error: OSError) -> str | None:
    """The file that the innermost function, or its object, had open when a write failed, which the error itself does not say."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        held = [*frame.f_locals.values(), *getattr(frame.f_locals.get("self"), "__dict__", {}).values()]
        names = [file.name for file in held if isinstance(file, io.IOBase) and hasattr(file, "name")]
        found = next((name for name in names if isinstance(name, str)), found)
    return found


_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that this user may use",
    errno.EPERM: "choose a place that this user may use",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
}


def described(value: Any, most: int = 120) -> str:
    """A value as messages show it, on one line: of bytes only their number, of an object only its keys."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        return "an object with " + (" ".join(", ".join(sorted(map(str, value))).split())[:80] or "nothing")
    if isinstance(value, (list, tuple)):
        filled = next((each for each in value if each), None)
        return f"{len(value)} values" + ("" if filled is None else f", such as {described(filled, most)}")
    return repr(value)[:most]
