"""Where a run continues: the newest checkpoint that is whole, made by the same configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from m4train.config import Config
from m4train.config.renamed import schema_with_old_keys, take_old_keys
from m4train.errors import CheckpointError, ConfigError, M4Error
from m4train.run_files import CHECKPOINTS, STATE
from m4train.training.checkpoints.files import check_manifest, checkpoints_in
from m4train.training.engines.base import Engine

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
    return config_dict(OmegaConf.to_container(completed))  # type: ignore[arg-type]


def _numbered(value: Any) -> Any:
    """The value with the keys that JSON made strings of, such as the steps of a schedule, as numbers again."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isdigit() else key: _numbered(inner) for key, inner in value.items()}


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def find_checkpoint(
    config: Config, say: Callable[[str], None] = print, among: Sequence[str] = ("*",)
) -> Checkpoint | None:
    """The checkpoint this run continues from, or None for a fresh start; every file of it was re-read and checked.

    resume=auto takes the newest whole checkpoint of run_dir and says a sentence for each damaged one it passes over;
    resume=PATH takes exactly that one; resume=never starts from the beginning. One rank calls it; see `agreed_checkpoint`. Only keys that
    the patterns `among` match are compared: to look at a model, its own are enough.
    Raises CheckpointError if the configuration differs in a key that may not change, if PATH is not whole, or if
    all checkpoints of the run are damaged; ConfigError if resume=never meets a run_dir that already holds some.
    """
    folder = Path(config.run_dir) / CHECKPOINTS
    candidates = [path for _, path in reversed(checkpoints_in(folder))]
    if config.resume == "never":
        if candidates:
            raise ConfigError(
                f"resume=never, but {folder} holds {candidates[0].name}; choose another run_dir or delete it."
            )
        return None
    if config.resume != "auto":
        return _compatible(open_checkpoint(Path(config.resume)), config, among)
    for candidate in candidates:
        try:
            checkpoint = open_checkpoint(candidate)
        except CheckpointError as error:
            say(f"{error} Falling back to the checkpoint before it.")
            continue
        return _compatible(checkpoint, config, among)
    if candidates:
        raise CheckpointError(
            f"Every checkpoint in {folder} is damaged; delete the folder to start from the beginning."
        )
    return None


def agreed_checkpoint(
    config: Config, engine: Engine, say: Callable[[str], None] = print, among: Sequence[str] = ("*",)
) -> Checkpoint | None:
    """What `find_checkpoint` finds on rank 0, on every rank; what it raises there, it raises on every rank."""
    found: Checkpoint | M4Error | None = None
    if engine.rank == 0:
        try:
            found = find_checkpoint(config, say, among)
        except M4Error as error:
            found = error
    found = engine.broadcast(found)
    if isinstance(found, M4Error):
        raise found
    return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's state after checking every file against the manifest. Raises CheckpointError."""
    check_manifest(folder)
    return Checkpoint(folder, json.loads((folder / STATE).read_text(encoding="utf-8")))


def starts_fresh_optimizer(checkpoint: Checkpoint, config: Config) -> bool:
    """Whether the run leaves the checkpoint's optimizer state behind: if resume_optimizer asks for it, until its first
    checkpoint, which a later start of the same run continues with the optimizer that it holds. Other values of the keys that
    come with an optimizer make it another run."""
    if config.resume_optimizer != "fresh":
        return False
    return bool(differing_keys(checkpoint.state["config"], config_dict(config), WITH_OPTIMIZER))


def _compatible(checkpoint: Checkpoint, config: Config, among: Sequence[str]) -> Checkpoint:
    differing = differing_keys(checkpoint.state["config"], config_dict(config), among)
    if starts_fresh_optimizer(checkpoint, config):
        differing = {key: values for key, values in differing.items() if not _matches(key, WITH_OPTIMIZER)}
    if differing:
        named = [f"{key} ({values})" for key, values in differing.items()]
        more = f" and {len(named) - SHOWN_KEYS} more" if len(named) > SHOWN_KEYS else ""
        raise CheckpointError(
            f"Checkpoint {checkpoint.folder} was made with other values of {', '.join(named[:SHOWN_KEYS])}{more}; "
            "put them back, or choose another run_dir."
        )
    return checkpoint
