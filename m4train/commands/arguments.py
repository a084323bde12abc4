"""How a command is described and its arguments are read. Light: a wrong argument is answered before torch is loaded, and
`m4train --help` without the modules that only some commands need."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from m4train.errors import ConfigError
from m4train.exits import say_once

if TYPE_CHECKING:
    from m4train.config import Config

OVERRIDES = "[group=choice ...] [key=value ...]"
OF_RUN = f"run_dir=RUN | resume=CHECKPOINT | {OVERRIDES}"


def taken(names: Sequence[str], arguments: list[str], plain: str = "") -> tuple[str | None, list[str]]:
    """The last value of an option, as `--name VALUE` or `--name=VALUE`, and the arguments without it.

    With `plain`, `plain=VALUE` is taken as well, with a hint. Raises ConfigError for an option without a value.
    """
    value, rest, left = None, [], iter(arguments)
    for argument in left:
        name, equals, given = argument.partition("=")
        if name in names:
            value = given if equals else next(left, None)
            if value is None:
                raise ConfigError(f"{name} needs a value: {name} VALUE.")
        elif plain and equals and name == plain:
            say_once(f"m4train: {argument} still works, but write {names[0]} {given}.")
            value = given
        else:
            rest.append(argument)
    return value, rest


class Number(NamedTuple):
    """`--NAME N`, a whole number of at least 1 that belongs to the command and not to the configuration."""

    name: str
    default: int | None = None  # None: it must be given
    meaning: str = ""

    def shown(self) -> str:
        return f"--{self.name} N" if self.default is None else f"[--{self.name} N]"

    def take(self, command: str, arguments: list[str]) -> tuple[Any, list[str]]:
        given, rest = taken([f"--{self.name}"], arguments, self.name)
        if given is None:
            if self.default is None:
                raise ConfigError(f"{command} needs --{self.name} N, {self.meaning}.")
            return self.default, rest
        if not given.isdigit() or not int(given):
            raise ConfigError(f"--{self.name} {given} is not a number of at least 1.")
        return int(given), rest


class Folder(NamedTuple):
    """`--NAME FOLDER`; `plain` is another word that it may be given by, as `plain=FOLDER`."""

    name: str
    meaning: str
    plain: str = ""
    needed: bool = True

    def shown(self) -> str:
        return f"--{self.name} FOLDER" if self.needed else f"[--{self.name} FOLDER]"

    def take(self, command: str, arguments: list[str]) -> tuple[Any, list[str]]:
        given, rest = taken([f"--{self.name}"], arguments, self.plain or self.name)
        if not given:
            if self.needed:
                raise ConfigError(f"{command} needs --{self.name} FOLDER, {self.meaning}.")
            return None, rest
        from pathlib import Path

        return Path(given), rest


class Word(NamedTuple):
    """`--NAME VALUE`, any text, which may be left out; also as `NAME=VALUE`, or `plain=VALUE`."""

    name: str
    plain: str = ""
    value: str = ""  # what stands for the value in help

    def shown(self) -> str:
        return f"[--{self.name} {self.value or self.name.upper()}]"

    def take(self, command: str, arguments: list[str]) -> tuple[Any, list[str]]:
        given, rest = taken([f"--{self.name}"], arguments, self.plain or self.name)
        return given or None, rest


class Flag(NamedTuple):
    """`--NAME`; if `plain`, also `NAME=true`."""

    name: str
    plain: bool = False

    def shown(self) -> str:
        return f"[--{self.name}]"

    def take(self, command: str, arguments: list[str]) -> tuple[Any, list[str]]:
        option, words = f"--{self.name}", {f"{self.name}={value}": value == "true" for value in ("true", "false")}
        on = option in arguments or (self.plain and any(words.get(argument, False) for argument in arguments))
        known = {option, *(words if self.plain else ())}
        return on, [argument for argument in arguments if argument not in known]


class Composed(NamedTuple):
    """What Hydra's own options ask for: where configurations are searched for, and what is shown instead of being done."""

    folders: list[str]  # --config-dir, -cd
    name: str | None  # --config-name, -cn
    cfg: str | None  # --cfg job|hydra|all, -c
    package: str | None  # --package, -p
    resolve: bool  # --resolve
    info: str | None  # --info defaults|searchpath|..., -i
    multirun: bool  # --multirun, -m

    def where(self) -> Any:
        from m4train.config.loading import Where

        return Where(tuple(self.folders), self.name or "train")

    def again(self) -> list[str]:
        """The options that another process needs to find the same configurations."""
        named = [word for folder in self.folders for word in ("--config-dir", folder)]
        return [*named, *(["--config-name", self.name] if self.name else [])]


HYDRA = "[--config-dir DIR] [--config-name NAME] [--cfg job|all] [--info defaults|searchpath] [--multirun]"


def hydra_options(arguments: list[str]) -> tuple[Composed, list[str]]:
    """Hydra's options, and the arguments without them."""
    folders: list[str] = []
    while (found := taken(["--config-dir", "-cd"], arguments))[0] is not None:
        folders, arguments = [*folders, found[0]], found[1]
    name, arguments = taken(["--config-name", "-cn"], arguments)
    cfg, arguments = taken(["--cfg", "-c"], arguments)
    package, arguments = taken(["--package", "-p"], arguments)
    info, arguments = taken(["--info", "-i"], arguments)
    resolve, multirun = "--resolve" in arguments, bool({"--multirun", "-m"} & set(arguments))
    if (package is not None or resolve) and cfg is None:
        raise ConfigError("--package and --resolve go with --cfg: --cfg job --package trainer.")
    if sum(asked is not None for asked in (cfg, info)) + multirun > 1:
        raise ConfigError("--cfg, --info and --multirun do different things: give one of them.")
    flags = ("--resolve", "--multirun", "-m")
    rest = [argument for argument in arguments if argument not in flags]
    return Composed(folders, name, cfg, package, resolve, info, multirun), rest


_KEY = re.compile(r"--[a-zA-Z_][\w.@/]*=")  # an override as `wandb agent` writes it
CORES = os.cpu_count() or 1
# The groups of a configuration that decide which packages a command needs, see config/packages.py
READS = ("data",)
EVALUATES = (*READS, "engine", "adapter")
TRAINS = (*EVALUATES, "optimizer", "logging")
JSON = Flag("json")


class Command(NamedTuple):
    """One command: `function` ("module:name" in this package) is loaded only after its arguments are known to be right.

    It is called with the configuration and the values of `options`, by position, and returns the exit status. `reads` says
    where the configuration comes from: `overrides`, `stages` (the same, for all stages of a run), `run` (a run that was
    trained, overrides on top), or nothing, in which case the function gets the list of arguments itself. `processes`: it runs on all processes of launch.processes.
    `needs`: the groups of the configuration that decide which packages must be installed.
    """

    summary: str
    function: str
    usage: str = OVERRIDES
    options: tuple[Number | Folder | Word | Flag, ...] = ()
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
        asked, rest = hydra_options(arguments)
        values = []
        for option in self.options:
            value, rest = option.take(name, rest)
            values.append(value)
        if asked.cfg is not None or asked.info is not None:
            from m4train.config.showing import show

            return show(asked, rest)
        if asked.multirun and name == "train":
            from m4train.commands.sweep import sweep

            return sweep(asked, rest)
        if asked.multirun:
            raise ConfigError(f"{name} takes no sweep: -m is for `m4train train`.")
        from m4train.config.compose import load_known_config, load_run_config, load_stages
        from m4train.config.packages import check_packages
        from m4train.scratch import scratch

        if name == "train":
            rest = [argument.removeprefix("--") if _KEY.match(argument) else argument for argument in rest]
        if self.reads == "stages":
            subject: Any = load_stages(rest, asked.where())
            configs = subject.configs
        else:
            load = load_known_config if self.reads == "overrides" else load_run_config
            subject = load(rest, asked.where())
            configs = [subject]
        for config in configs:
            check_packages(config, self.needs)
        with scratch():
            code = handed_over(configs, [*name.split(), *arguments]) if self.processes else None
            return self._load()(subject, *values) if code is None else code

    def _load(self, place: str | None = None) -> Callable[..., Any]:
        module, _, function = (place or self.function).partition(":")
        return getattr(importlib.import_module(f"m4train.commands.{module}"), function)


def handed_over(configs: Sequence[Config], arguments: list[str]) -> int | None:
    """Runs `m4train ARGUMENTS` on the processes of launch.processes, if this process has to start them; its exit code then.

    Raises ConfigError if this process is one of a group that does not fit the configuration.
    """
    from pathlib import Path

    from m4train import launching

    for config in configs:
        launching.check_launched(config)
    config = configs[0]
    if not launching.starts_processes(config):
        return None
    return launching.launch(arguments, config.launch.processes or 1, Path(config.run_dir))
