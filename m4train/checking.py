"""The words of configuration checks. Each raises ConfigError where it does not hold."""

from __future__ import annotations

from m4train.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} is {value!r}, but must be one of {', '.join(choices)}.")


def at_least(key: str, value: float, least: float) -> None:
    require(value >= least, f"{key} is {value}, but must be at least {least}.")
