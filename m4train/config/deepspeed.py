"""The DeepSpeed configuration of a run, generated from ours and complete: nothing in it is left to be filled in."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4train.config import Config
from m4train.config.deepspeed_keys import FREE_TOP, FREE_ZERO, ON_BY_DEFAULT, TOP, ZERO
from m4train.config.require import leaves
from m4train.errors import ConfigError

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
_BUCKET = 50_000_000  # elements reduced or gathered at once
_NEVER = 2**31 - 1

# What this program decides itself, with the default DeepSpeed takes for a key that is not given, and by which of our keys; a user's own
# DeepSpeed file may repeat it, but not change it.
_OWNED: dict[str, tuple[Any, str]] = {
    "train_batch_size": (None, "trainer.micro_batch_size"),
    "train_micro_batch_size_per_gpu": (None, "trainer.micro_batch_size"),
    "gradient_accumulation_steps": (1, "trainer.global_batch_size"),
    "managed_gradient_accumulation": (True, ""),
    "gradient_clipping": (0.0, "trainer.max_grad_norm"),
    "prescale_gradients": (False, ""),
    "gradient_predivide_factor": (1.0, ""),
    "gradient_allreduce_op": ("mean", ""),
    "sequence_parallel_size": (1, ""),
    "tensor_parallel.autotp_size": (0, ""),
    "expert_parallel": (None, ""),
    "elasticity.enabled": (False, ""),
    "hybrid_engine.enabled": (False, ""),
    "zero_allow_untested_optimizer": (False, ""),
    "zero_force_ds_cpu_optimizer": (True, ""),
    "zero_optimization.stage": (0, "engine"),
    "zero_optimization.offload_optimizer.device": ("none", "engine.offload"),
    "zero_optimization.offload_param.device": ("none", "engine.offload"),
    "zero_optimization.zenflow": (None, ""),
    "torch_autocast.enabled": (False, "trainer.precision"),
    "torch_autocast.dtype": ("bfloat16", "trainer.precision"),
    "torch_autocast.lower_precision_safe_modules": ([], "trainer.precision"),
    "bf16.enabled": (False, "trainer.precision"),
    "bfloat16.enabled": (False, "trainer.precision"),
    "fp16.enabled": (False, "trainer.precision"),
    "optimizer": (None, "optimizer"),
    "scheduler": (None, "schedule"),
}


def check_deepspeed_file(config: Config) -> None:
    """Refuses, with ConfigError, a file named by engine.deepspeed that cannot be merged, before there are any ranks."""
    deepspeed_config(config, 1, ("train_batch_size",))


def deepspeed_config(config: Config, world_size: int, unchecked: Sequence[str] = ()) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    The loss arrives divided by the tokens of the whole step and its boundary is set by hand, so DeepSpeed accumulates
    "one" micro-batch. Raises ConfigError for a conflicting or unfinished file named by engine.deepspeed; keys `unchecked`
    may conflict.
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
    if config.trainer.precision != "fp32":
        # fp32 storage and reduction, products in half precision: what autocast does under the other engines.
        half = "float16" if config.trainer.precision == "fp16" else "bfloat16"  # auto: decided before a model is made
        ours["torch_autocast"] = {"enabled": True, "dtype": half, "lower_precision_safe_modules": []}
    if config.engine.deepspeed is None:
        return ours
    path = Path(config.engine.deepspeed)
    merged = _merged(ours, _user_file(path))
    for key, (default, way_out) in _OWNED.items():
        given, kept = _value(merged, key, default), _value(ours, key, default)
        if given != kept and key not in unchecked:
            instead = f"remove it there and set {way_out} here" if way_out else "remove it there"
            raise ConfigError(f"{path} sets {key} to {given}, but this run needs {kept}: {instead}.")
    _check_free(path, _user_file(path), ours, unchecked)
    return merged


def _check_free(path: Path, theirs: dict[str, Any], ours: dict[str, Any], unchecked: Sequence[str]) -> None:
    """Refuses keys that are not proved to leave a run's numbers alone, unless they say what is so anyway."""
    zero = theirs.get("zero_optimization", {})
    given = {key: value for key, value in theirs.items() if key not in FREE_TOP and key != "zero_optimization"}
    given |= {f"zero_optimization.{key}": value for key, value in zero.items() if key not in FREE_ZERO}
    for key, value in given.items():
        owned = any(name == key or name.startswith(f"{key}.") for name in _OWNED)
        same = (None, key.rpartition(".")[2] in ON_BY_DEFAULT, _value(ours, key, None))
        if not owned and value not in same and key not in unchecked:
            raise ConfigError(
                f"{path} sets {key} to {value}, which is not known to leave a run's numbers and checkpoints as they are: remove it."
            )


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


def _user_file(path: Path) -> dict[str, Any]:
    """A user's own DeepSpeed JSON, refused if DeepSpeed does not know it whole or it says "auto"."""
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.deepspeed names {path}, which cannot be read as JSON ({error}).") from error
    if not isinstance(theirs, dict):
        raise ConfigError(f"engine.deepspeed names {path}, which holds {theirs!r}: it must be an object of keys.")
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{path} sets zero_optimization to {zero!r}: it must be an object of keys.")
    _check_known(path, "", theirs, TOP)
    _check_known(path, "zero_optimization.", zero, ZERO)
    for key, value in leaves(theirs):
        if value == "auto":
            raise ConfigError(f'{path} leaves {key} at "auto"; give a value or remove the key.')
    return theirs


def _check_known(path: Path, prefix: str, given: dict[str, Any], known: frozenset[str]) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {prefix}{close[0]}?)" if close else ""
            raise ConfigError(
                f"{path} sets {prefix}{key}, which is not a key of DeepSpeed{hint}: correct or remove it."
            )


def _value(settings: Any, key: str, default: Any) -> Any:
    """What a dotted key is set to; a key that is absent or null has its default."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return default if settings is None else settings


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged
