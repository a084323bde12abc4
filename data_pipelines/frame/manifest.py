"""What a stage was started with. datatrove alone would mix attempts that differ; here the second one is refused."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import m4train
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import write_json
from m4train.errors import ConfigError

MANIFEST = "manifest.json"


def manifest_of(
    steps: list[Step], options: dict[str, Any], tasks: int, reads: Path | None, keep: bool
) -> dict[str, Any]:
    """Everything that decides what a stage writes: its input list, number of ranks, configuration, and code."""
    inputs = sorted(entry for step in steps for entry in step.inputs())
    return {
        "inputs": {"files": len(inputs), "bytes": sum(size for _, size in inputs), "hash": _hash(inputs)},
        "tasks": tasks,
        "configuration": {"steps": options, "keep": keep},
        "reads": _hash_of_stage(reads) if reads else None,
        "code": code_version(),
    }


def check_manifest(folder: Path, manifest: dict[str, Any], accept: list[str]) -> None:
    """Writes the manifest of a stage that begins. Raises ConfigError with the reason if it was begun with another one."""
    path = folder / MANIFEST
    if not path.is_file():
        write_json(path, manifest)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, now in manifest.items():
        if before.get(name) != now and not (name == "code" and "code" in accept):
            raise ConfigError(
                f"{folder} was begun with other {_difference(name, before.get(name), now)}: go on with what it was begun "
                f"with, choose another folder, or remove {folder} to begin again{_way(name)}."
            )


def code_version() -> str:
    """The version of the package, and a hash of the files of the pipelines."""
    return f"{m4train.__version__}+{_hash_of_code()}"


@cache
def _hash_of_code() -> str:
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _hash_of_stage(folder: Path) -> str:
    """What stands for the documents of a stage: its manifest, or the sizes of the files of a folder without one."""
    if (folder / MANIFEST).is_file():
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return _hash({name: value for name, value in values.items() if name != "code"})
    return _hash([(path.name, path.stat().st_size) for path in sorted(folder.glob("documents-*"))])


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "inputs":
        files = [f"{values['files']} files of {values['bytes']} bytes" for values in (before, now)]
        return f"input files ({files[0]} then, {files[1]} now)" + (
            "" if files[0] != files[1] else ", of other names or sizes"
        )
    if name == "tasks":
        return f"tasks ({before} then, {now} now)"
    if name == "reads":
        return "documents to read (the stage that writes them was made again)"
    if name == "code":
        return f"code ({before} then, {now} now)"
    changed = sorted(_changed(before or {}, now, ""))
    return f"configuration ({'; '.join(changed[:3])})"


def _changed(before: Any, now: Any, where: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        if list(before) != list(now) and set(before) == set(now):
            return [f"{where[1:]} in another order"]
        return [
            line
            for name in {**before, **now}
            if before.get(name) != now.get(name)
            for line in _changed(before.get(name), now.get(name), f"{where}.{name}")
        ]
    return [f"{where[1:]} {json.dumps(before)[:80]} then, {json.dumps(now, default=str)[:80]} now"]


def _way(name: str) -> str:
    return ", or accept=[code] if the change does not matter" if name == "code" else ""
