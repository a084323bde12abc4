"""Checkpoints written while training goes on: what is saved is copied at a step border, and a thread writes the copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m4train.training.checkpoints.save import save_checkpoint, write_checkpoint
from m4train.training.engines.base import Engine


class Saver:
    """Saves checkpoints into `folder`, at most one at a time; every rank has one and makes the same calls.

    With `in_background` the loop waits only for the copy in CPU memory. Writing, reading back, hashing and the rename follow in a
    thread, whose collectives have a process group of their own. Without, `save` returns when the checkpoint is there.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        keep_last: int,
        keep_every: int,
        save_extra: Callable[[Path], None] | None,
        in_background: bool,
    ) -> None:
        self.folder, self.engine, self.in_background = folder, engine, in_background
        self._rest = (keep_last, keep_every, save_extra)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: list[Path] = []  # whole checkpoints that nobody was told of

    def take_written(self) -> list[Path]:
        """The checkpoints that came into their place since the last call."""
        return [self._written.pop(0) for _ in range(len(self._written))]  # of one list, which a thread adds to

    def save(self, state: dict[str, Any]) -> None:
        """Saves the engine's tensors as they are now, with `state`; first waits for the save before it.

        Raises CheckpointError on every rank if this one, or the one before it, could not be written.
        """
        self.wait()
        if not self.in_background:
            self._written.append(save_checkpoint(self.folder, self.engine, state, *self._rest))
            return
        tensors = self.engine.staged()
        self._thread = threading.Thread(target=self._write, args=(tensors, state), name="checkpoint")
        self._thread.start()

    def _write(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        try:
            path = write_checkpoint(self.folder, self.engine, tensors, state, *self._rest)
            self._written.append(path)
        except BaseException as error:
            self._error = error

    def failed(self) -> bool:
        """Whether this rank knows that the save under way could not be written; the others learn it a little apart."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when nothing is under way. Raises what the last save raised, once."""
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Lets the save under way come to its end, however it ends."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
