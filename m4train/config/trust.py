"""Code that a configuration names: functions and shell commands.

A run directory may come from a stranger. What the user's own command, or a file of `conf/` that it chooses, names is run; what a
config.yaml, a starts.jsonl or a state.json names is refused until the command names it itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from m4train.config import Config
from m4train.errors import ConfigError

_COMMAND = "pipe:"


def code_named(config: Config) -> dict[str, str]:
    """By key, the functions and shell commands that this configuration would run."""
    data, evaluation = config.data, config.evaluation
    metrics = {f"evaluation.metrics.{name}": metric for name, metric in evaluation.metrics.items()}
    named = {"data.prepare": data.prepare or "", "evaluation.metric": evaluation.metric, **metrics}
    named["optimizer.name"] = config.optimizer.name
    named |= {f"logging.trackers.{number}": name for number, name in enumerate(config.logging.trackers)}
    found = {key: value for key, value in named.items() if ":" in value}
    for group, sources in (("sources", data.sources), ("validation", data.validation)):
        for name, source in sources.items():
            if _COMMAND in source.path:
                found[f"data.{group}.{name}.path"] = source.path
    return found


def check_code(
    config: Config, where: Path, given: Collection[str], conf: Path, known: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuses code that a configuration stored in `where` names and the command does not.

    `given`: the keys that the command sets itself. `conf`: the folder whose files are the installation's own. `known`: code by
    key that was allowed before. Raises ConfigError with what to add to the command.
    """
    own: set[str] | None = None
    for key, value in code_named(config).items():
        if known.get(key) == value or any(key == name or key.startswith(f"{name}.") for name in given):
            continue
        own = _texts_of(conf) if own is None else own
        if value not in own:
            raise ConfigError(
                f"{where} names code to run, {key}={value}, which a file of a run may not: read that code, and add "
                f"'{key}={value}' to the command if you trust it."
            )


def _texts_of(conf: Path) -> set[str]:
    """Every text in the choices of the groups."""
    return {
        text for path in conf.glob("*/*.yaml") for text in _leaves(yaml.safe_load(path.read_text(encoding="utf-8")))
    }


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _leaves(inner)
