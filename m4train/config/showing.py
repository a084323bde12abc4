"""What Hydra's options `--cfg` and `--info` show instead of running a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from m4train.config.compose import explained, hydra_at
from m4train.errors import ConfigError

CFGS = ("job", "hydra", "all")
INFOS = ("all", "defaults", "defaults-tree", "config", "plugins", "searchpath")


def show(asked: Any, overrides: list[str]) -> int:
    """Prints the composition before its checks, or how it came about; returns 0. `asked` holds Hydra's options
    (commands/arguments.py). Raises ConfigError for what cannot be composed."""
    where = asked.where()
    with explained(where):
        hydra = hydra_at(where)
        if asked.info is not None:
            _one_of("--info", asked.info, INFOS)
            with _said_by_hydra_alone():
                hydra.show_info(asked.info, where.name, overrides)
        else:
            _one_of("--cfg", asked.cfg, CFGS)
            try:
                hydra.show_cfg(where.name, overrides, asked.cfg, asked.package, asked.resolve)
            except SystemExit as error:
                raise ConfigError(f"--package {asked.package} is not a part of the configuration.") from error
    return 0


@contextmanager
def _said_by_hydra_alone() -> Iterator[None]:
    """Hydra prints through the root logger, at a level at which other packages have much to say."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    for name in list(root.manager.loggerDict):
        if name.partition(".")[0] != "hydra":
            logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        sys.stdout.flush()
        root.handlers[:], root.level = before, level


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{option} is {value!r}, but must be one of {', '.join(choices)}.")
