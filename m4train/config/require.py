"""The building blocks of configuration checks. Each raises ConfigError if its condition does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from m4train.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} is {value!r}, but must be one of {', '.join(choices)}.")


def at_least(key: str, value: float, least: float) -> None:
    require(value >= least, f"{key} is {value}, but must be at least {least}.")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings, items of lists by their number."""
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
