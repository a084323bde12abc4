"""Extensions that DeepSpeed may have to compile, under a lock that dies with the process that compiles."""

from __future__ import annotations

from typing import IO, Any


class Baton:
    """Stands for torch's FileBaton, whose file stays if its owner is killed, and holds every later start for ever.

    Who waits gets its turn when the owner has compiled or died, and compiles what is missing then: nothing as a rule.
    """

    def __init__(self, path: str, *timing: Any, **options: Any) -> None:
        self._path = f"{path}.held"
        self._file: IO[str] | None = None

    def try_acquire(self) -> bool:
        """Waits for its turn; always True."""
        import fcntl

        self._file = open(self._path, "w")  # noqa: SIM115  (until it is released)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def compile_in_turn() -> None:
    """Makes torch compile extensions under locks that die with their owners."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = Baton
