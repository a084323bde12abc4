"""The files of a checkpoint on disk: flushed, listed in a manifest with hashes, and checked against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m4train.durable import fsync_folder
from m4train.errors import CheckpointError
from m4train.run_files import CHECKPOINTS, STATE, newest_stage
from m4train.wandb_artifacts import FROM, artifact_folder

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, oldest first, each with its step; anything else in the folder is ignored."""
    named = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def start_folder(pretrained: str) -> str:
    """The folder or hub id to start from; of a run directory its newest checkpoint, of one with stages that of the last, of an
    artifact of W&B its folder."""
    if pretrained.startswith(FROM):
        return str(artifact_folder(pretrained))
    checkpoints = checkpoints_in(newest_stage(Path(pretrained)) / CHECKPOINTS)
    return str(checkpoints[-1][1]) if checkpoints else pretrained


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


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file under `folder`, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Lists every file under `folder` with its size and sha256, which may be `known`; the last file of a checkpoint to be
    written."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        entries[name] = {"size": path.stat().st_size, "sha256": (known or {}).get(name) or sha256(path)}
    write_json(folder / MANIFEST, entries)


def check_manifest(folder: Path) -> dict[str, str]:
    """The sha256 of every listed file. Raises CheckpointError naming the first that is missing, of another size, or of another
    content."""
    for name, entry in (entries := _entries(folder)).items():
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
    return {name: entry["sha256"] for name, entry in entries.items()}


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest lists."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Checkpoint {folder} has no readable {MANIFEST} ({error}).") from error
    if not isinstance(entries, dict) or STATE not in entries:
        raise CheckpointError(f"File {MANIFEST} of checkpoint {folder} is damaged: it does not list {STATE}.")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointError(f"File {MANIFEST} of checkpoint {folder} is damaged: its line on {name} is not one.")
    return entries
