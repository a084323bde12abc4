"""What `adapter.from_config` takes from the folder that `adapter.start_from` names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4train.config.schema import AdapterConfig
from m4train.errors import ConfigError
from m4train.run_files import STATE

ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
ANY_PART = "*"  # in adapter.targets: modules of any part
_PREFIX = "base_model.model."
_TAKEN = ("kind", "rank", "alpha", "rank_stabilized", "rank_pattern", "alpha_pattern", "targets", "modules_to_save")


def take_adapter(adapter: AdapterConfig, overrides: Sequence[str]) -> None:
    """Sets the keys of `adapter` to those of the adapter it starts from, if from_config asks for that.

    Raises ConfigError if there is nothing to take them from, or `overrides` set one of them too.
    """
    if not adapter.from_config:
        return
    if adapter.start_from is None:
        raise ConfigError(
            "adapter.from_config is true, but adapter.start_from is null: name the folder to take it from."
        )
    given = [key for key in (override.lstrip("+").partition("=")[0] for override in overrides) if _is_taken(key)]
    if given:
        raise ConfigError(
            f"adapter.from_config takes the adapter's settings from {adapter.start_from}, but {given[0]} is given too: "
            "leave one of the two out."
        )
    quantized = adapter.kind == "qlora"
    for key, value in stored_settings(Path(adapter.start_from)).items():
        setattr(adapter, key, value)
    if quantized and adapter.kind == "lora":
        adapter.kind = "qlora"  # how the base is stored is not the adapter's to say


def _is_taken(key: str) -> bool:
    return any(key == f"adapter.{name}" or key.startswith(f"adapter.{name}.") for name in _TAKEN if name != "kind")


def stored_settings(folder: Path) -> dict[str, Any]:
    """The keys of `AdapterConfig` that decide what the adapter of a peft folder, or of a checkpoint, computes.

    Raises ConfigError if `folder` is neither, or is damaged.
    """
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return _of_peft(folder, peft_values(folder))
    if (folder / STATE).is_file():
        stored = _json(folder / STATE).get("config", {}).get("adapter", {})
        neutral = AdapterConfig()
        kind = "lora" if stored.get("kind") == "qlora" else stored.get("kind")
        return {key: stored.get(key, getattr(neutral, key)) for key in _TAKEN} | {"kind": kind}
    raise ConfigError(
        f"adapter.start_from is {folder}, but must be a folder with {ADAPTER_FILE}, or a checkpoint such as "
        "RUN/checkpoints/step-000100."
    )


def peft_values(folder: Path) -> dict[str, Any]:
    """What adapter_config.json of a folder holds. Raises ConfigError for an adapter of another kind than LoRA."""
    values = _json(folder / ADAPTER_CONFIG_FILE)
    if values.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder} holds an adapter of the kind {values.get('peft_type')}, but only LORA can be loaded."
        )
    return values


def peft_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of `AdapterConfig` that an adapter_config.json decides, apart from which modules it adapts."""
    return {
        "kind": "dora" if values.get("use_dora") else "lora",
        "rank": values.get("r", 8),
        "alpha": float(values.get("lora_alpha", 8)),
        "rank_stabilized": bool(values.get("use_rslora")),
        "rank_pattern": dict(values.get("rank_pattern") or {}),
        "alpha_pattern": {name: float(value) for name, value in (values.get("alpha_pattern") or {}).items()},
    }


def _of_peft(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The adapted modules are taken from the names of the tensors, which a list of endings or a pattern leaves open."""
    from safetensors import safe_open

    try:
        with safe_open(folder / ADAPTER_FILE, framework="numpy") as file:
            names = [name.removeprefix(_PREFIX) for name in file.keys()]  # noqa: SIM118
    except Exception as error:  # the library raises its own types, by version
        raise ConfigError(f"{folder / ADAPTER_FILE} cannot be read ({error}): copy the folder again.") from error
    adapted = sorted({name.split(".lora_")[0] for name in names if ".lora_" in name})
    in_full = sorted(values.get("modules_to_save") or [])
    return peft_settings(values) | {"targets": {ANY_PART: adapted}, "modules_to_save": in_full}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): copy the folder again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping: copy the folder again.")
    return values
