"""Where a run continues: the newest checkpoint of its line that is whole, or the one it is told to begin from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from m4train.config import Config
from m4train.errors import CheckpointError, ConfigError
from m4train.run_files import CHECKPOINTS
from m4train.training.checkpoints.changes import EVERYTHING, check_changes
from m4train.training.checkpoints.files import checkpoints_in, start_folder
from m4train.training.checkpoints.state import Checkpoint, checkpoint_id, open_checkpoint
from m4train.training.engines.base import Engine, agreed

_NO_BASES: Mapping[str, str] = {}


def find_checkpoint(
    config: Config,
    say: Callable[[str], None] = print,
    among: Sequence[str] = EVERYTHING,
    bases: Mapping[str, str] = _NO_BASES,
) -> Checkpoint | None:
    """The checkpoint this run continues from, or None for a fresh start; every file of it was re-read and checked.

    resume=auto takes the newest whole checkpoint of run_dir and says a sentence for each damaged one it passes over.
    resume=PATH is where run_dir starts, or goes back to: once run_dir holds a checkpoint that came from it, the newest of
    those is taken. resume=never starts from the beginning. One rank calls it; see `agreed_checkpoint`. To look at a model, only the keys
    that the patterns `among` match are compared, and PATH is exactly that one. `bases`: see `check_changes`.
    Raises CheckpointError if the configuration differs in a key that may not change, if PATH is not whole, or if
    all checkpoints of the run are damaged; ConfigError if resume=never or PATH meets a run_dir that holds others.
    """
    folder = Path(config.run_dir) / CHECKPOINTS
    if config.resume == "never":
        if held := checkpoints_in(folder):
            raise ConfigError(
                f"resume=never, but {folder} holds {held[-1][1].name}; choose another run_dir or delete it."
            )
        return None
    if config.resume == "auto":
        found = newest(folder, say)
    elif among == EVERYTHING:
        found = _begun_from(Path(config.resume), folder, say)
    else:
        found = open_checkpoint(Path(config.resume))
    if found is not None:
        check_changes(found.folder, found.state, config, bases, among)
    return found


def newest(folder: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest whole checkpoint in the folder of a run; None if there is none at all. Raises CheckpointError if all
    are damaged."""
    candidates = [path for _, path in reversed(checkpoints_in(folder))]
    for candidate in candidates:
        try:
            return open_checkpoint(candidate)
        except CheckpointError as error:
            if candidate is not candidates[-1]:
                say(f"{error} Falling back to the checkpoint before it.")
                continue
            raise CheckpointError(
                f"Every checkpoint in {folder} is damaged ({error}); delete the folder to start from the beginning."
            ) from error
    return None


def _begun_from(named: Path, folder: Path, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint `named`, or the newest one of `folder` if that came from it already."""
    if runs := checkpoints_in(named / CHECKPOINTS):
        raise CheckpointError(f"{named} is a run, not a checkpoint: name one of it, such as resume={runs[-1][1]}.")
    within = named.resolve().parent == folder.resolve()
    own = newest(folder, say)
    if own is not None and _came_from(own, named, within):
        say(f"{folder.parent} began from {named} already and goes on from {own.folder.name}, its newest checkpoint.")
        return own
    if own is not None and not within:
        raise ConfigError(
            f"{folder} holds {own.folder.name}, which did not come from {named}: choose another run_dir, or leave resume out."
        )
    return dataclasses.replace(open_checkpoint(named), departs=True)


def _came_from(own: Checkpoint, named: Path, within: bool) -> bool:
    """Whether a run that holds `own` began from `named`, or, if that is one of its own, went back to it last."""
    if "lineage" not in own.state:  # of an earlier version
        return not within
    content, path = checkpoint_id(named), str(named.resolve())
    starts = own.lineage[-1:] if within else own.lineage
    return any(start["id"] == content if content else start["checkpoint"] == path for start in starts)


def start_checkpoint(config: Config) -> Checkpoint:
    """The checkpoint that model.pretrained names. Raises CheckpointError if it names none."""
    return open_checkpoint(Path(start_folder(str(config.model.pretrained))))


def agreed_checkpoint(
    config: Config,
    engine: Engine,
    say: Callable[[str], None] = print,
    among: Sequence[str] = EVERYTHING,
    bases: Mapping[str, str] = _NO_BASES,
) -> Checkpoint | None:
    """What `find_checkpoint` finds on rank 0, on every rank; what it raises there, it raises on every rank."""
    return agreed(engine, lambda: find_checkpoint(config, say, among, bases))
