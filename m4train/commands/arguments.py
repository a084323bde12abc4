"""How a command is described and its arguments are read. Light: a wrong argument is answered before torch is loaded, and
`m4train --help` without the modules that only some commands need."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from m4train.errors import ConfigError

if TYPE_CHECKING:
    from m4train.config import Config

OVERRIDES = "[group=choice ...] [key=value ...]"
OF_RUN = f"run_dir=RUN | resume=CHECKPOINT | {OVERRIDES}"


class Number(NamedTuple):
    """`NAME=N`, a whole number of at least 1 that belongs to the command and not to the configuration."""

    name: str
    default: int | None = None  # None: it must be given
    meaning: str = ""

    def take(self, command: str, arguments: list[str]) -> tuple[Any, list[str]]:
        given, rest = _given(self.name, arguments)
        if given is None:
            if self.default is None:
                raise ConfigError(f"{command} needs {self.name}=N, {self.meaning}.")
            return self.default, rest
        if not given.isdigit() or not int(given):
            raise ConfigError(f"{self.name}={given} is not a number of at least 1.")
        return int(given), rest


class Folder(NamedTuple):
    """`NAME=FOLDER`, which must be given."""

    name: str
    meaning: str

    def take(self, command: str, arguments: list[str]) -> tuple[Any, list[str]]:
        given, rest = _given(self.name, arguments)
        if not given:
            raise ConfigError(f"{command} needs {self.name}=FOLDER, {self.meaning}.")
        from pathlib import Path

        return Path(given), rest


class Flag(NamedTuple):
    """`--NAME`."""

    name: str

    def take(self, command: str, arguments: list[str]) -> tuple[Any, list[str]]:
        option = f"--{self.name}"
        return option in arguments, [argument for argument in arguments if argument != option]


def _given(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The last value of `name=VALUE`, and the arguments without it."""
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{name}=")]
    return (given[-1] if given else None), [argument for argument in arguments if not argument.startswith(f"{name}=")]


CORES = os.cpu_count() or 1
# The groups of a configuration that decide which packages a command needs, see config/packages.py
READS = ("data",)
EVALUATES = (*READS, "engine", "adapter")
TRAINS = (*EVALUATES, "optimizer", "logging")
JSON = Flag("json")


class Command(NamedTuple):
    """One command: `function` ("module:name" in this package) is loaded only after its arguments are known to be right.

    It is called with the configuration and the values of `options`, by position, and returns the exit status. `reads` says
    where the configuration comes from: `overrides`, `run` (a run that was trained, overrides on top), or nothing, in which
    case the function gets the list of arguments itself. `processes`: it runs on all processes of launch.processes.
    `needs`: the groups of the configuration that decide which packages must be installed.
    """

    summary: str
    function: str
    usage: str = OVERRIDES
    options: tuple[Number | Folder | Flag, ...] = ()
    reads: str = "overrides"
    processes: bool = False
    parser: str = ""  # "module:name" of what makes the parser of a command that reads its arguments itself
    needs: tuple[str, ...] = READS

    def parser_help(self) -> str | None:
        """The help of a command that reads its arguments itself; None if it says nothing more than `usage`."""
        return self._load(self.parser)().format_help() if self.parser else None

    def run(self, name: str, arguments: list[str]) -> int:
        """Reads the arguments and does it. Raises ConfigError for what is wrong with them."""
        if not self.reads:
            return self._load()(arguments)
        values, rest = [], arguments
        for option in self.options:
            value, rest = option.take(name, rest)
            values.append(value)
        from m4train.config.compose import load_known_config, load_run_config
        from m4train.config.packages import check_packages

        config = load_known_config(rest) if self.reads == "overrides" else load_run_config(rest)
        check_packages(config, self.needs)
        if self.processes:
            code = _handed_over(config, [*name.split(), *arguments])
            if code is not None:
                return code
        return self._load()(config, *values)

    def _load(self, place: str | None = None) -> Callable[..., Any]:
        module, _, function = (place or self.function).partition(":")
        return getattr(importlib.import_module(f"m4train.commands.{module}"), function)


def _handed_over(config: Config, arguments: list[str]) -> int | None:
    """Runs `m4train ARGUMENTS` on the processes of launch.processes, if this process has to start them; its exit code then.

    Raises ConfigError if this process is one of a group that does not fit the configuration.
    """
    from pathlib import Path

    from m4train import launching

    launching.check_launched(config)
    if not launching.starts_processes(config):
        return None
    return launching.launch(arguments, config.launch.processes or 1, Path(config.run_dir))
