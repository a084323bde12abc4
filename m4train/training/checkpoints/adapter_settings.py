"""Whether an adapter that was stored computes what this run's adapter would: what its tensors alone do not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m4train.config import AdapterConfig
from m4train.config.adapter_start import ADAPTER_CONFIG_FILE, peft_settings, peft_values, stored_settings
from m4train.errors import CheckpointError

_COMPARED = ("kind", "rank", "alpha", "rank_stabilized", "rank_pattern", "alpha_pattern")
# Of adapter_config.json: who wrote it and for what, how it trained, and which modules it adapts, which its tensors say.
_INERT = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
    ]
)
_ALLOWED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


def check_settings(folder: Path, adapter: AdapterConfig) -> None:
    """Raises CheckpointError for the first setting of a stored adapter that this run's adapter has not, with both values."""
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        values = peft_values(folder)
        _check_known(folder, values)
        stored = peft_settings(values)
    else:
        stored = stored_settings(folder)
    own: dict[str, Any] = {key: getattr(adapter, key) for key in _COMPARED}
    own["kind"] = "lora" if own["kind"] == "qlora" else own["kind"]
    for key in _COMPARED:
        if own[key] != stored[key]:
            raise CheckpointError(
                f"The adapter in {folder} was made with adapter.{key} {stored[key]}, but this run has {own[key]}: set it to "
                "the stored value, or set adapter.from_config=true."
            )


def _check_known(folder: Path, values: dict[str, Any]) -> None:
    for key, value in values.items():
        known = value in _ALLOWED[key] if key in _ALLOWED else key in _INERT or not value
        if not known:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG_FILE} sets {key} to {value!r}, which adapters here do not have: merge that adapter "
                "into its base with peft, and start from the result."
            )
