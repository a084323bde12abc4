"""Whether a class keeps a contract (`TrainableModel`, `SampleProcessor`) before anything is built on it."""

from __future__ import annotations

from typing import Any

from m4train.errors import ConfigError


def require_members(value: Any, contract: type, what: str) -> None:
    """Raises ConfigError, naming what is missing, if `value` lacks a member of the protocol class `contract`."""
    members = {*vars(contract), *vars(contract).get("__annotations__", {})}
    wanted = sorted(name for name in members if not name.startswith("_") or name in ("__call__",))
    missing = [name for name in wanted if not hasattr(value, name)]
    if missing:
        raise ConfigError(
            f"{what} {type(value).__name__} lacks {', '.join(missing)}: add what {contract.__name__} in "
            f"{contract.__module__} asks for."
        )
