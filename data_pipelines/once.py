"""Builds a dataset folder exactly once, whoever asks first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from m4train.errors import DataError

MANIFEST = "manifest.json"


def build_once(root: Path, recipe: dict[str, Any], build: Callable[[Path], None]) -> bool:
    """Runs `build(folder)` under a lock and moves what it wrote to `root`; returns False if `root` is already whole.

    `recipe` describes what is built (name, version, settings) and is kept in the manifest: a folder built by another
    recipe is refused, never overwritten. A build that is killed leaves nothing at `root`.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{root}.lock"):
        if root.exists() and any(root.iterdir()):
            _check_manifest(root, recipe)
            return False
        unfinished = root.with_name(f".{root.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        build(unfinished)
        (unfinished / MANIFEST).write_text(json.dumps(recipe, indent=2) + "\n")
        os.replace(unfinished, root)
    return True


def _check_manifest(root: Path, recipe: dict[str, Any]) -> None:
    manifest = root / MANIFEST
    found = json.loads(manifest.read_text()) if manifest.is_file() else None
    if found != recipe:
        raise DataError(
            f"{root} was not built by the recipe {recipe} (its {MANIFEST} says {found}): "
            "move the folder away, or set data.root to another one."
        )
