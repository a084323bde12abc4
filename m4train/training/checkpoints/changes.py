"""What may differ between a checkpoint and the run that continues it, and how that is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from omegaconf import OmegaConf

from m4train.config import Config, ScheduleConfig, compose
from m4train.errors import CheckpointError
from m4train.training.schedule import rate_factor

EVERYTHING = ("*",)
MODEL_KEYS = ("model.*", "adapter.*", "freeze.*")  # what decides which tensors a checkpoint holds, and what they mean
SHOWN_KEYS = 8  # of a refusal, or of what changed
_ABSENT = "absent"

# Settings of one start of a run: not worth a word.
OF_A_START = ("resume", "resume_optimizer", "launch.*", "trainer.stop_after", "trainer.max_hours")

# Keys that may differ since none of them changes what is computed, except rounding, which trainer.compile, model.loss and
# another engine do differently.
WITHOUT_EFFECT = (
    "name",
    "run_dir",
    "stage",
    "stages",
    "threads",
    "logging.*",
    "engine.*",
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
    "trainer.log_every",
    "trainer.save_every",
    "trainer.async_checkpoint",
    "trainer.eval_every",
    "trainer.eval_first",
    "trainer.benchmarks.*",
    "trainer.benchmark_data",
    "trainer.benchmark_weights.*",
    "trainer.epochs_until",
    "trainer.best.*",
    "trainer.early_stopping.*",
    "trainer.keep_last",
    "trainer.keep_every",
    "trainer.worst_batch_first",
    "trainer.hang_timeout",
)

# Keys that may differ since it is clear what a change means: it holds from the next step on (docs/training.md).
FROM_HERE_ON = (
    "trainer.max_steps",
    "trainer.global_batch_size",
    "trainer.batch_ramp.*",
    "trainer.precision",
    "trainer.max_grad_norm",
    "trainer.skip_outliers",
    "trainer.neftune_alpha",
    "freeze.rules",
    "freeze.frozen_dtype",
    "adapter.modules_to_save",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.arguments",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.parts",
    "optimizer.parts.*",
    "schedule.*",
    "adapter.dropout",
    "model.z_loss",
    "data.epochs",
    "data.mixture.*",
    "data.augment.*",
    "data.sources.*.weight",
    "data.sources.*.loss_weight",
    "data.sources.*.epochs",
    "data.sources.*.path",  # moved data: the hashes in its index decide whether it is the same
)

# Keys that name what a run starts from: they may name another place that holds the same.
BASES = (
    "model.pretrained",
    "model.vision_pretrained",
    "model.text_pretrained",
    "model.tokenizer",
    "adapter.start_from",
)

# Keys that an optimizer's state depends on, which resume_optimizer=fresh leaves behind.
OF_THE_OPTIMIZER = ("optimizer.name",)
_OF_TRAINING = ("schedule.*", "trainer.max_grad_norm", "trainer.max_steps", "trainer.skip_outliers")
_ASKS_ANEW = ("resume_optimizer", "optimizer.*", "freeze.rules", "adapter.modules_to_save", *_OF_TRAINING)


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


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the default of every key it lacks, also inside its sources and parts."""
    return json.loads(_completed(json.dumps(config)))


@lru_cache(8)  # a start asks several times for the same two, each of which takes OmegaConf a good part of a second
def _completed(config: str) -> str:
    return json.dumps(OmegaConf.to_container(compose.completed(json.loads(config)), resolve=True))


def matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def differences(
    before: Mapping[str, Any], now: Config, among: Sequence[str] = EVERYTHING
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys, of those that the patterns `among` match, with their values in a stored configuration and now.

    A key that one of them lacks, as in a checkpoint of an earlier version, counts as its default.
    """
    old, new = flatten(completed(dict(before))), flatten(completed(config_dict(now)))
    keys = (key for key in sorted(old.keys() | new.keys()) if matches(key, among))
    both = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def starts_fresh_optimizer(state: Mapping[str, Any], config: Config) -> bool:
    """Whether the run leaves a checkpoint's optimizer state behind: if resume_optimizer asks for it, until its first
    checkpoint, which a later start of the same run continues with the optimizer that it holds. Other values of the keys that
    come with an optimizer make it another run."""
    if config.resume_optimizer != "fresh":
        return False
    return bool(differences(state["config"], config, (*_ASKS_ANEW, *OF_THE_OPTIMIZER)))


def check_changes(
    folder: object,
    state: Mapping[str, Any],
    config: Config,
    bases: Mapping[str, str],
    among: Sequence[str] = EVERYTHING,
) -> None:
    """Raises CheckpointError if a run cannot go on from a checkpoint since a key differs that has no meaning to change, or
    what it started from was replaced. `bases` names the content of what BASES name now, as far as it is there."""
    found = differences(state["config"], config, among)
    replaced = [key for key, content in state.get("bases", {}).items() if bases.get(key, content) != content]
    if replaced and among == EVERYTHING:
        key = replaced[0]
        raise CheckpointError(
            f"{key} names {value_of(config, key)}, which holds something else than when the run of checkpoint {folder} began: "
            "put it back, or choose another run_dir to start from what it holds now."
        )
    same_base = {key for key, content in state.get("bases", {}).items() if bases.get(key) == content}
    fresh = OF_THE_OPTIMIZER if starts_fresh_optimizer(state, config) else ()
    allowed: tuple[str, ...] = (*OF_A_START, *WITHOUT_EFFECT, *FROM_HERE_ON, *fresh)
    streamed = {f"data.sources.{name}.path" for name, source in config.data.sources.items() if source.stream}
    refused = {
        key: values
        for key, values in found.items()
        if key in streamed or not (matches(key, allowed) or key in same_base)
    }
    if refused:
        named = [f"{key} ({then} then, {now} now)" for key, (then, now) in refused.items()]
        more = f" and {len(named) - SHOWN_KEYS} more" if len(named) > SHOWN_KEYS else ""
        way = "put them back, or choose another run_dir"
        if all(matches(key, OF_THE_OPTIMIZER) for key in refused):
            way += ", or set resume_optimizer=fresh, which keeps the weights and loses the optimizer's moments"
        raise CheckpointError(
            f"Checkpoint {folder} was made with other values of {', '.join(named[:SHOWN_KEYS])}{more}; {way}."
        )


def continuing(state: Mapping[str, Any], config: Config, more: str = "") -> str:
    """What is said when a run goes on: its step, the keys that changed, the learning rate if that makes a step, and `more`."""
    step = state["step"]
    text = f"continuing from step {step}{changed_since(state['config'], config)}"
    then, now = (_rate(completed(values), step + 1) for values in (state["config"], config_dict(config)))
    if abs(then - now) > 1e-9 * max(then, now):
        text += f"; learning rate of step {step + 1}: {then:.3g} -> {now:.3g}"
    if starts_fresh_optimizer(state, config):
        text += "; the optimizer starts again, without its moments"
    return text + more


def changed_since(before: Mapping[str, Any], config: Config) -> str:
    """The keys that differ from a stored configuration, as the end of a sentence; "" for none."""
    found = differences(before, config)
    changed = [f"{key} {then} -> {now}" for key, (then, now) in found.items() if not matches(key, OF_A_START)]
    others = f" and {len(changed) - SHOWN_KEYS} more" if len(changed) > SHOWN_KEYS else ""
    return f"; changed: {', '.join(changed[:SHOWN_KEYS])}{others}" if changed else ""


def _rate(config: Mapping[str, Any], step: int) -> float:
    """The learning rate of a step under a completed configuration."""
    factor = rate_factor(ScheduleConfig(**config["schedule"]), config["trainer"]["max_steps"], step)
    return config["optimizer"]["lr"] * factor


def value_of(config: Config, key: str) -> Any:
    """What a configuration holds under a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
