"""The files of a checkpoint on disk: flushed, listed in a manifest with hashes, and checked against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from m4train.errors import CheckpointError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, oldest first, each with its step; anything else in the folder is ignored."""
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Makes every file and name under a folder durable."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def write_json(path: Path, value: object) -> None:
    """Writes JSON that is on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path) -> None:
    """Lists every file under `folder` with its size and sha256; the last file of a checkpoint to be written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    write_json(folder / MANIFEST, entries)


def check_manifest(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is missing, of another size, or of another content."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Checkpoint {folder} has no readable {MANIFEST} ({error}).") from error
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"Checkpoint {folder} lacks its file {name}.")
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                f"File {name} of checkpoint {folder} has {size} bytes, but {entry['size']} were written."
            )
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"File {name} of checkpoint {folder} is damaged: its sha256 is not the one written.")
