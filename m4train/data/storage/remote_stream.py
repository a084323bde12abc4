"""A remote file as a seekable stream of bytes, for those who want a file."""

from __future__ import annotations

import io
from typing import Any


class RemoteStream(io.RawIOBase):
    """A remote file as a seekable stream of bytes."""

    def __init__(self, files: Any, path: str) -> None:
        super().__init__()
        self._files, self._path, self._place = files, path, 0
        self._size = files.size(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._files.read(self._path, self._place, len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
