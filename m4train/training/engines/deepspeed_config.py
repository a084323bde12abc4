"""The DeepSpeed configuration of a run, generated from ours and complete: nothing in it is left to be filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m4train.config import Config
from m4train.errors import ConfigError
from m4train.training.resume import flatten

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_BUCKET = 50_000_000  # elements reduced or gathered at once
_NEVER = 2**31 - 1

# What this program decides itself; a user's own DeepSpeed file may repeat it, but not change it.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization.stage",
    "torch_autocast",
    "bf16",
    "fp16",
    "amp",
    "optimizer",
    "scheduler",
)


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    The loss arrives divided by the tokens of the whole step and its boundary is set by hand, so DeepSpeed accumulates
    "one" micro-batch. Raises ConfigError for a conflicting or unfinished file named by engine.deepspeed.
    """
    micro = config.trainer.micro_batch_size
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro * world_size,
        "gradient_clipping": config.trainer.max_grad_norm,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config),
    }
    if config.trainer.precision == "bf16":
        # fp32 storage and reduction, bf16 products: what autocast does under the other engines.
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if config.engine.deepspeed is not None:
        _merge(ours, _user_file(Path(config.engine.deepspeed), ours))
    return ours


def _zero(config: Config) -> dict[str, Any]:
    stage = STAGES[config.engine.name]
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if stage == 3:
        zero.update(
            stage3_prefetch_bucket_size=_BUCKET,
            stage3_param_persistence_threshold=0,
            stage3_max_live_parameters=1_000_000_000,
            stage3_max_reuse_distance=1_000_000_000,
            memory_efficient_linear=False,
        )
        if config.engine.offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return zero


def _user_file(path: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """A user's own DeepSpeed JSON, refused where it contradicts what this program decides or says "auto"."""
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.deepspeed names {path}, which cannot be read as JSON ({error}).") from error
    known = flatten(ours)
    for key, value in flatten(theirs).items():
        if value == "auto":
            raise ConfigError(f'{path} leaves {key} at "auto"; give a value or remove the key.')
        owned = any(key == name or key.startswith(f"{name}.") for name in _OWNED)
        if owned and known.get(key) != value:
            raise ConfigError(
                f"{path} sets {key} to {value}, but this run has {known.get(key)}; remove it there and set the "
                "key of trainer, optimizer, schedule or engine that it stands for."
            )
    return theirs


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
