"""Where a run continues: the newest checkpoint of its line that is whole, or the one it is told to begin from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from m4train.config import Config
from m4train.config.renamed import schema_with_old_keys, take_old_keys
from m4train.config.start import forget_scratch
from m4train.errors import CheckpointError, ConfigError, M4Error
from m4train.run_files import CHECKPOINTS
from m4train.training.checkpoints.changes import EVERYTHING, check_changes
from m4train.training.checkpoints.files import checkpoints_in
from m4train.training.checkpoints.state import Checkpoint, checkpoint_id, open_checkpoint
from m4train.training.engines.base import Engine

_NO_BASES: Mapping[str, str] = {}
MODEL_KEYS = ("model.*", "adapter.*", "freeze.*")  # what decides which tensors a checkpoint holds, and what they mean
WITH_OPTIMIZER = (
    "resume_optimizer",
    "optimizer.*",
    "schedule.*",
    "freeze.rules",
    "adapter.modules_to_save",
    "trainer.max_grad_norm",
    "trainer.max_steps",  # the schedule's length
)
SHOWN_KEYS = 8  # of a refusal
_ABSENT = "absent"

# Keys that may differ between a checkpoint and the run that continues it: none of them changes what is computed, except
# rounding, which trainer.compile, model.loss and another engine do differently.
CHANGEABLE = (
    "name",
    "run_dir",
    "resume",
    "threads",
    "logging.*",
    "engine.*",
    "launch.*",
    "evaluation.*",
    "export.*",
    "data.root",
    "data.prepare",
    "data.validation.*",
    "data.num_workers",
    "data.prefetch_steps",
    "data.auto_index_limit",
    "data.index_dir",
    "data.cache_dir",
    "data.cache_size",
    "data.cost.*",
    "data.max_bad_fraction",
    "model.loss",
    "trainer.micro_batch_size",
    "trainer.gradient_checkpointing",
    "trainer.compile",
    "trainer.deterministic",
    "trainer.max_skipped_in_a_row",
    "trainer.stop_after",
    "trainer.log_every",
    "trainer.save_every",
    "trainer.async_checkpoint",
    "trainer.eval_every",
    "trainer.keep_last",
    "trainer.keep_every",
    "trainer.max_hours",
    "trainer.worst_batch_first",
    "trainer.hang_timeout",
)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, and what state.json holds (`step`, `plan`, `config`, `callbacks`, `versions`)."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def plan(self) -> dict[str, Any]:
        """The state of the data plan after `step`, for the loader that continues."""
        return self.state["plan"]


def config_dict(config: Config | dict[str, Any]) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return json.loads(json.dumps(config if isinstance(config, dict) else dataclasses.asdict(config)))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested dictionaries; lists are values."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differing_keys(before: dict[str, Any], now: dict[str, Any], among: Sequence[str] = ("*",)) -> dict[str, str]:
    """Dotted keys, of those that the patterns `among` match, whose values differ and may not within a run; with both values.

    A key that one of them lacks, as in a checkpoint of an earlier version, counts as its default.
    """
    old, new = flatten(_completed(before)), flatten(_completed(now))
    changed = (key for key in sorted(old.keys() | new.keys()) if old.get(key, _ABSENT) != new.get(key, _ABSENT))
    return {
        key: f"{old.get(key, _ABSENT)} then, {new.get(key, _ABSENT)} now"
        for key in changed
        if not _matches(key, CHANGEABLE) and _matches(key, among)
    }


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the default of every key it lacks, also inside its sources and parts."""
    schema = schema_with_old_keys()
    OmegaConf.set_struct(schema, False)
    completed = OmegaConf.merge(schema, _numbered(config))
    take_old_keys(completed)
    forget_scratch(completed.model)
    return config_dict(OmegaConf.to_container(completed))  # type: ignore[arg-type]


def _numbered(value: Any) -> Any:
    """The value with the keys that JSON made strings of, such as the steps of a schedule, as numbers again."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isdigit() else key: _numbered(inner) for key, inner in value.items()}


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


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


def agreed_checkpoint(
    config: Config,
    engine: Engine,
    say: Callable[[str], None] = print,
    among: Sequence[str] = EVERYTHING,
    bases: Mapping[str, str] = _NO_BASES,
) -> Checkpoint | None:
    """What `find_checkpoint` finds on rank 0, on every rank; what it raises there, it raises on every rank."""
    found: Checkpoint | M4Error | None = None
    if engine.rank == 0:
        try:
            found = find_checkpoint(config, say, among, bases)
        except M4Error as error:
            found = error
    found = engine.broadcast(found)
    if isinstance(found, M4Error):
        raise found
    return found
