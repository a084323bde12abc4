"""Files of the Hugging Face Hub (`hf://datasets/ORG/NAME@REVISION/PATH`) that its cache on this machine holds already."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m4train.errors import DataError

HUB = "hf://"
_PLACE = re.compile(r"(?:hf://)?(?:(datasets|models|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the Hub."""
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def cached_files(pattern: str) -> list[str]:
    """The files of the cache that a path or pattern of the Hub names. Raises DataError if there are none."""
    snapshot, path = _snapshot(pattern)
    found = [] if snapshot is None else sorted(glob.glob(str(Path(glob.escape(str(snapshot)), path)), recursive=True))
    files = [file for file in found if os.path.isfile(file)]
    if not files:
        raise DataError(
            f"HF_HUB_OFFLINE is set, and the cache of the Hub holds no {pattern}: unset it, or fetch the files before with "
            "`hf download --repo-type dataset`."
        )
    return files


def hub_files(pattern: str, filesystem: Any, place: str, patiently: Callable[[str, Callable], Any]) -> list[str]:
    """The files that a path or pattern of the Hub names, in the cache if that holds all of them with the same content (so that
    their order is the same). Raises DataError if there is no such repository, revision or file."""
    filesystem.invalidate_cache()
    look = filesystem.glob if set("*[") & set(pattern) else lambda path, detail: {path: filesystem.info(path)}
    try:
        found = patiently(pattern, lambda: look(place, detail=True))
    except FileNotFoundError:
        raise DataError(
            f"There is no {pattern} on the Hub, or it is private: correct the source's path, or `hf auth login`."
        ) from None
    files = {path: info for path, info in sorted(found.items()) if info["type"] == "file"}
    copies = [copy for path, info in files.items() if (copy := cached_copy(path, info)) is not None]
    return copies if len(copies) == len(files) else [filesystem.unstrip_protocol(path) for path in files]


def cached_copy(path: str, info: Mapping[str, Any]) -> str | None:
    """The file of the cache with the content that the Hub says `path` has (`info`, of HfFileSystem); None if there is none."""
    snapshot, inside = _snapshot(path)
    if snapshot is None or not (snapshot / inside).is_file():
        return None
    content = (info.get("lfs") or {}).get("sha256") or info.get("blob_id")  # what the cache calls a file by
    return str(snapshot / inside) if (snapshot / inside).resolve().name == content else None


def _snapshot(path: str) -> tuple[Path | None, str]:
    """The folder of a repository's revision in the cache, None if it is not there, and the path inside it."""
    from huggingface_hub import constants

    found = _PLACE.fullmatch(path)
    if found is None:
        return None, path
    kind, name, revision, inside = found.groups()
    folder = Path(constants.HF_HUB_CACHE, "--".join([kind or "models", *name.split("/")]))
    revision = (revision or "main").replace("%2F", "/")
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return (snapshot if snapshot.is_dir() else None), inside
