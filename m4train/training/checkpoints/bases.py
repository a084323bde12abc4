"""What a run starts from, named by its content: moved it is still the same, replaced it is not."""

from __future__ import annotations

import hashlib
from pathlib import Path

from m4train.config import Config
from m4train.run_files import CHECKPOINTS, LINEAGE_FILE, newest_stage
from m4train.training.checkpoints.changes import BASES, value_of
from m4train.training.checkpoints.files import checkpoints_in
from m4train.training.checkpoints.state import checkpoint_id

_SUFFIXES = (".json", ".jinja", ".model", ".safetensors")
_BLOCK, _BLOCKS = 2**16, 16  # of a large file so many blocks are read, spread evenly


def bases(config: Config) -> dict[str, str]:
    """The content of each folder that a configuration starts from, by its key; hub models and what is not there are left out."""
    named = {key: value_of(config, key) for key in BASES}
    found = {key: _content(Path(value)) for key, value in named.items() if value and Path(value).is_dir()}
    return {key: content for key, content in found.items() if content is not None}


def _content(folder: Path) -> str | None:
    """Of a checkpoint or of the newest one of a run its manifest; of another folder its configuration and weights."""
    checkpoints = checkpoints_in(newest_stage(folder) / CHECKPOINTS)
    if checkpoints:
        return checkpoint_id(checkpoints[-1][1])
    return checkpoint_id(folder) or _files(folder)


def _files(folder: Path) -> str | None:
    digest = hashlib.sha256()
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.name != LINEAGE_FILE)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(max(_BLOCK * block, (size - _BLOCK) * block // (_BLOCKS - 1)))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16] if files else None
