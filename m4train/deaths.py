"""Which samples a process of a run died with: each process notes what it is at in a file that outlives it, and whoever started
it reads that note when it has died. What it died with before is kept in `run_dir/deaths.jsonl`.

Nothing heavy is imported: launchers use it.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4train import exits
from m4train.json_lines import read_lines
from m4train.run_files import DEATHS

_AHEAD = (
    3  # micro-batches that a GPU may still be busy with when the next one begins, so that they are under suspicion too
)
_SHOWN = 8  # samples that a sentence names


class Note:
    """What one rank is at, for `died`: a file in the folder in which the processes of a launch leave word.

    One small write for each micro-batch, which needs no flush: the file is whole once its process has ended.
    """

    def __init__(self, folder: Path, run_dir: Path, rank: int) -> None:
        self._file = os.open(folder / _name(rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._who = json.dumps({"rank": rank, "node": node, "run_dir": str(run_dir.resolve())})[1:-1]
        self._earlier: deque[str] = deque(maxlen=_AHEAD)
        self._current: tuple[Any, str] = ((), "[]")
        self._ahead = False

    def write(self, stage: str, step: int, documents: Sequence[Any] = (), ahead: bool = False) -> None:
        """Notes what begins: the stage, its step, and the samples (their `source`, `key` and `shard`) of the micro-batch. With
        `ahead` those of the last ones are kept as well, because the device may not have come so far."""
        if documents is not self._current[0]:
            if self._ahead and self._current[0]:
                self._earlier.append(self._current[1])
            self._ahead = ahead
            samples = [(document.source, document.key, document.shard) for document in documents]
            self._current = documents, json.dumps(list(dict.fromkeys(samples)))
        elif documents:
            return  # the same micro-batch, a stage later
        every = ", ".join([self._current[1], *reversed(self._earlier)])
        os.pwrite(
            self._file, f'{{"stage": "{stage}", "step": {step}, "samples": [{every}], {self._who}}}\n'.encode(), 0
        )


def note_of(run_dir: Path, rank: int) -> Note | None:
    """The note of this process; None if nobody who started it would read it."""
    folder = os.environ.get(exits.FOLDER)
    try:
        return Note(Path(folder), run_dir, rank) if folder else None
    except OSError:  # the folder is gone with who started this
        return None


def died(folder: Path, rank: int) -> str:
    """What is known of a rank that died, of which the note is in `folder`: where it was, and which samples it, or another rank
    of the run, died with before. Empty if there is no note. It is added to those of the run."""
    note = _read(folder / _name(rank))
    if note is None:
        return ""
    samples = list(dict.fromkeys(tuple(sample) for batch in note["samples"] for sample in batch))
    deaths = Path(note["run_dir"]) / DEATHS
    earlier = [death["samples"] for death in read_lines(deaths, ("samples",)) if isinstance(death["samples"], list)]
    before = {tuple(sample) for found in earlier for sample in found if isinstance(sample, list)}
    try:
        with deaths.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**note, "samples": samples}) + "\n")
    except OSError:
        pass  # the run directory is gone
    where = f"it was on {note['node']}, in {note['stage']} of step {note['step']}"
    again = [sample for sample in samples if sample in before]
    return f"{where}{_accused(again, note) if again else ''}"


def _accused(samples: list[tuple[str, str, str]], note: dict[str, Any]) -> str:
    shown = ", ".join(f"{source}:{key} in {shard}" for source, key, shard in samples[:_SHOWN])
    more = f" and {len(samples) - _SHOWN} more, listed in {DEATHS}" if len(samples) > _SHOWN else ""
    shards = sorted({shard for *_, shard in samples[:_SHOWN]})
    place = shards[0] if len(shards) == 1 else f"{os.path.dirname(shards[0])}/*{os.path.splitext(shards[0])[1]}"
    keys = ",".join(key for _, key, _ in samples[:_SHOWN])
    return (
        f", and a rank died before with {'this sample' if len(samples) == 1 else 'these samples'}: {shown}{more}. "
        f"`m4train replay --step {note['step']} run_dir={note['run_dir']}` shows them; "
        f"`m4train pipeline takedown 'shards={place}' 'keys=[{keys}]' folder=takedown` leaves them out from the next start on"
    )


def _read(path: Path) -> dict[str, Any] | None:
    """The first line of a note: a later, shorter one leaves the end of an earlier one behind it."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"samples", "run_dir", "node", "stage", "step"} <= set(found) else None


def _name(rank: int) -> str:
    return f"at-{rank}.json"
