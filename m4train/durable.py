"""What is on disk to stay when a call returns, and what is gone then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: which files it holds, and under which names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes what stands under a name: a folder with all it holds, a file, or a link alone, and not what that points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
