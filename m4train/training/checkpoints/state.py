"""What state.json of a checkpoint holds: its version, its shape, and reading it with every part checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4train.errors import CheckpointError, ConfigError
from m4train.run_files import STATE
from m4train.training.checkpoints.changes import completed
from m4train.training.checkpoints.files import MANIFEST, check_manifest

VERSION = 2  # 1, which is not written down: without lineage and bases

_CURSOR = {"epoch": int, "position": int}
_UNIT = (int,) * 7  # what packing.Unit holds
_PLANNED = {
    "plan": str,
    "step": int,
    "packs": int,
    "streams": {str: _CURSOR},
    "active": [str],
    "shares": {str: float},
    "pool": [_UNIT],
    "waiting": [_UNIT],
    "closed": [[_UNIT]],
}
_STREAMED = {"step": int, "streaming": bool, "positions": {str: float}}
_DEPARTURE = {"checkpoint": str, "id": str, "step": int}
_STATE = {"step": int, "plan": dict, "config": dict, "callbacks": {str: dict}, "versions": {str: str}}
_SINCE_2 = {"skipped": int, "lineage": [_DEPARTURE], "bases": {str: str}, "files": {str: str}, "digest": str}
_COMPUTED = ("version", "step", "plan", "skipped", "callbacks", "files")  # what the digest is of


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and what state.json holds (`step`, `plan`, `config`, `callbacks`, `versions`, `lineage`).

    `departs`: the run begins again from here, whatever came after it before.
    """

    folder: Path
    state: dict[str, Any]
    departs: bool = False

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def plan(self) -> dict[str, Any]:
        """The state of the data plan after `step`, for the loader that continues."""
        return self.state["plan"]

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The checkpoints that the run was told to begin from, oldest first; the last may be this one."""
        earlier = self.state.get("lineage", [])
        return [*earlier, departure(self.folder, self.step)] if self.departs else earlier


def departure(folder: Path, step: int) -> dict[str, Any]:
    """How a lineage names the checkpoint in `folder`."""
    return {"checkpoint": str(folder.resolve()), "id": checkpoint_id(folder), "step": step}


def checkpoint_id(folder: Path) -> str | None:
    """Names the content of a checkpoint, wherever it is stored; None if there is none."""
    path = folder / MANIFEST
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's state after checking every file against the manifest, and the state against its schema.

    Raises CheckpointError, naming the file and what is wrong with it.
    """
    hashes = check_manifest(folder)
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"File {STATE} of checkpoint {folder} cannot be read ({error}).") from error
    wrong = _wrong(state) or _misnamed(folder, state) or _unsealed(state, hashes)
    if wrong:
        raise CheckpointError(
            f"File {STATE} of checkpoint {folder} is not what this version of m4train reads: {wrong}."
        )
    return Checkpoint(folder, state)


def _wrong(state: Any) -> str | None:
    """What is wrong with a state, in words."""
    if not isinstance(state, dict):
        return f"it holds {_kind(state)} instead of a mapping"
    version = state.get("version", 1)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        return f"its version is {version!r}, but {VERSION} is the newest that is known"
    if wrong := _mismatch(state, _STATE if version == 1 else {**_STATE, **_SINCE_2}, ""):
        return wrong
    plan = state["plan"]
    shape = _PLANNED if "streams" in plan or "plan" in plan else _STREAMED if "positions" in plan else {}
    if wrong := _mismatch(plan, shape, "plan"):
        return wrong
    if version > 1 and not plan:
        return "plan is empty"
    if plan.get("step", state["step"]) != state["step"]:
        return f"plan belongs to step {plan.get('step')}, but the state to step {state['step']}"
    try:
        completed(state["config"])
    except (ConfigError, ValueError, TypeError) as error:
        return f"its config is not one ({str(error).splitlines()[0]})"
    return None


def sealed(state: dict[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """A state with the sha256 of the files next to it, and a digest of what the run goes on from."""
    state = json.loads(json.dumps({**state, "files": dict(hashes)}))  # as it will be read
    return {**state, "digest": _digest(state)}


def _digest(state: Mapping[str, Any]) -> str:
    described = json.dumps({key: state[key] for key in _COMPUTED if key in state}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _unsealed(state: dict[str, Any], hashes: Mapping[str, str]) -> str | None:
    """What is wrong with a state that fits its schema and its manifest, but was not written like this."""
    if "digest" not in state:  # of an earlier version
        return None
    if state["digest"] != _digest(state):
        return "its digest is another"
    other = [name for name, content in state["files"].items() if hashes.get(name) != content]
    return f"{other[0]} is not the file that was written with it" if other else None


def _misnamed(folder: Path, state: dict[str, Any]) -> str | None:
    match = re.fullmatch(r"step-(\d+)", folder.name)
    if match and int(match[1]) != state["step"]:
        return f"it is of step {state['step']}"
    return None


def _mismatch(value: Any, shape: Any, where: str) -> str | None:
    """The first place where a value has another type than the shape asks for, in words; None if there is none.

    A shape is a type, a list of one shape, a tuple of a shape for each place of a list, a mapping from `str` to one shape, or
    a mapping of keys that must be there.
    """
    if isinstance(shape, type):
        right = isinstance(value, (int, float) if shape is float else shape)
        right = right and isinstance(value, bool) == (shape is bool)
        return None if right else f"{where} is {_kind(value)} instead of {shape.__name__}"
    if isinstance(shape, tuple):
        if not isinstance(value, list) or len(value) != len(shape):
            return f"{where} is not a list of {len(shape)}"
        pairs: Any = ((f"{where}[{n}]", *pair) for n, pair in enumerate(zip(value, shape, strict=True)))
    elif not isinstance(value, type(shape)):
        return f"{where} is {_kind(value)} instead of {type(shape).__name__}"
    elif isinstance(shape, list):
        pairs = ((f"{where}[{n}]", inner, shape[0]) for n, inner in enumerate(value))
    elif str in shape:
        pairs = ((f"{where}.{key}".lstrip("."), inner, shape[str]) for key, inner in value.items())
    else:
        missing = [key for key in shape if key not in value]
        if missing:
            return f"{'.'.join(filter(None, [where, missing[0]]))} is missing"
        pairs = ((f"{where}.{key}".lstrip("."), value[key], inner) for key, inner in shape.items())
    return next((wrong for place, inner, of in pairs if (wrong := _mismatch(inner, of, place))), None)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
