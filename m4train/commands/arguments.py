"""How a command is described and its arguments are read, on click. Light: a wrong argument is answered before torch is loaded,
and `m4train --help` without the modules that only some commands need."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from m4train import startup
from m4train.errors import ConfigError
from m4train.exits import say_once

if TYPE_CHECKING:
    from m4train.config import Config

OVERRIDES = "[group=choice ...] [key=value ...]"
OF_RUN = f"run_dir=RUN | resume=CHECKPOINT | {OVERRIDES}"


def option(*names: str, **settings: Any) -> click.Option:
    """`--NAME VALUE` of a command, in the words of click.Option."""
    return click.Option(names, **settings)


def number(name: str, default: int | None = None, about: str = "") -> click.Option:
    """`--NAME N`, a whole number of at least 1; without a default it must be given."""
    known = {} if default is None else {"default": default, "show_default": True}
    return option(f"--{name}", type=click.IntRange(1), metavar="N", required=default is None, help=about, **known)


def words(name: str, metavar: str, **settings: Any) -> click.Argument:
    """Any number of arguments without a name."""
    return click.Argument([name], nargs=-1, type=click.UNPROCESSED, metavar=metavar, **settings)


class Composed(NamedTuple):
    """What Hydra's own options ask for: where configurations are searched for, and what is shown instead of being done."""

    folders: tuple[str, ...] = ()
    name: str | None = None
    cfg: str | None = None
    package: str | None = None
    resolve: bool = False
    info: str | None = None
    multirun: bool = False

    def where(self) -> Any:
        from m4train.config.loading import Where

        return Where(tuple(self.folders), self.name or "train")

    def again(self) -> list[str]:
        """The options that another process needs to find the same configurations."""
        named = [word for folder in self.folders for word in ("--config-dir", folder)]
        return [*named, *(["--config-name", self.name] if self.name else [])]

    def check(self) -> None:
        """Raises ConfigError for options that do not go together."""
        if (self.package is not None or self.resolve) and self.cfg is None:
            raise ConfigError("--package and --resolve go with --cfg: --cfg job --package trainer.")
        if sum(asked is not None for asked in (self.cfg, self.info)) + self.multirun > 1:
            raise ConfigError("--cfg, --info and --multirun do different things: give one of them.")


HYDRA = (
    option("--config-dir", "-cd", "folders", multiple=True, metavar="DIR", help="a folder of configurations, as conf/"),
    option("--config-name", "-cn", "name", metavar="NAME", help="the root to compose instead of train"),
    option("--cfg", "-c", metavar="job|hydra|all", help="show the composition instead"),
    option("--package", "-p", metavar="PART", help="with --cfg: this part of it"),
    option("--resolve", is_flag=True, help="with --cfg: interpolations as what they stand for"),
    option("--info", "-i", metavar="defaults|searchpath|...", help="show how the composition came about instead"),
    option("--multirun", "-m", is_flag=True, help="a run for each point of a sweep (train)"),
)

CORES = os.cpu_count() or 1
# The groups of a configuration that decide which packages a command needs, see config/packages.py
READS = ("data",)
EVALUATES = (*READS, "engine", "adapter")
TRAINS = (*EVALUATES, "optimizer", "logging")
JSON = option("--json", "as_json", is_flag=True, help="print JSON instead of tables")
_FORMER = {"to": "out"}  # words that options were given by, besides their own


class Command(click.Command):
    """One command: `function` ("module:name" in this package) is loaded only after its arguments are known to be right.

    It is called with the configuration and, by name, the values of `options`, and returns the exit status. `reads` says
    where the configuration comes from: `overrides`, `stages` (the same, for all stages of a run), `shape` (the same as overrides,
    but data need not be named yet), `run` (a run that was trained, overrides on top), `asked` (the function composes itself what it
    gets as Composed and overrides), or nothing.
    `processes`: it runs on all processes of launch.processes. `needs`: the groups of the configuration that decide which
    packages must be installed. `more` ("module:name") gives further lines of help: the keys of the command with what they
    mean, or a text.
    """

    def __init__(
        self,
        summary: str,
        function: str,
        *options: click.Parameter,
        reads: str = "overrides",
        processes: bool = False,
        needs: Sequence[str] = READS,
        examples: Sequence[str] = (),
        more: str = "",
    ) -> None:
        over = [words("overrides", OF_RUN if reads == "run" else OVERRIDES)] if reads else []
        settings = {"ignore_unknown_options": bool(reads), "help_option_names": ["-h", "--help"]}
        params = [*options, *(HYDRA if reads else ()), *over]
        super().__init__(None, context_settings=settings, params=params, help=summary)
        self.function, self.reads, self.processes, self.needs = function, reads, processes, needs
        self.examples, self.more = examples, more
        named = [p for p in options if isinstance(p, click.Option)]
        self.plain = {p.name: p.opts[0] for p in named if not p.is_flag}
        self.flags = {p.name: p.opts[0] for p in named if p.is_flag and not p.secondary_opts}

    @property
    def summary(self) -> str:
        return self.help or ""

    def run(self, name: str, arguments: Sequence[str]) -> int:
        """Reads the arguments and does it. Raises ConfigError for what is wrong with them, and click's Exit after its help."""
        with self.make_context(
            f"m4train {name}", [part for word in arguments for part in self._spelt(word)]
        ) as context:
            values = dict(context.params)
        if not self.reads:
            return self.load()(**values)
        asked = Composed(**{field: values.pop(field) for field in Composed._fields})
        asked.check()
        overrides = list(values.pop("overrides"))
        if self.reads == "asked":
            return self.load()(asked, overrides, **values)
        overrides = [self._override(word) for word in overrides]
        if asked.cfg is not None or asked.info is not None:
            from m4train.config.showing import show

            return show(asked, overrides)
        if asked.multirun:
            if name != "train":
                raise ConfigError(f"{name} takes no sweep: -m is for `m4train train`.")
            from m4train.commands.sweep import sweep

            return sweep(asked, overrides)
        return self._on_configuration(name, arguments, asked, overrides, values)

    def _on_configuration(
        self, name: str, arguments: Sequence[str], asked: Composed, overrides: list[str], values: dict[str, Any]
    ) -> int:
        from m4train.config.compose import load_known_config, load_run_config, load_stages
        from m4train.config.packages import check_packages
        from m4train.scratch import scratch
        from m4train.terminal import narrated, stage

        with narrated(), scratch():
            startup.command("configuration")
            stage("reading the configuration")
            if self.reads == "stages":
                subject: Any = load_stages(overrides, asked.where())
                configs = subject.configs
            elif self.reads == "run":
                subject = load_run_config(overrides, asked.where())
                configs = [subject]
            else:
                subject = load_known_config(overrides, asked.where(), sources=self.reads != "shape")
                configs = [subject]
            for config in configs:
                check_packages(config, self.needs)
            stage("importing torch and what the command needs")
            startup.enter("imports")
            code = handed_over(configs, [*name.split(), *arguments]) if self.processes else None
            if code is None and self.reads == "stages" and any(config.data.num_workers for config in configs):
                from m4train.data.loading.processes import worker_context

                worker_context()  # which imports torch meanwhile as well
            return self.load()(subject, **values) if code is None else code

    def _spelt(self, word: str) -> list[str]:
        """`ranks=8` as `--ranks=8`, and `private=true` as `--private`, with a hint."""
        name, equals, value = word.partition("=")
        flag = value in ("true", "false") and name in self.flags
        known = (self.flags if flag else self.plain).get(_FORMER.get(name, name)) if equals and self.reads else None
        if known is None:
            return [word]
        say_once(f"m4train: {word} still works, but write {known}{'' if flag else f' {value}'}.")
        return [known] * (value == "true") if flag else [f"{known}={value}"]

    def _override(self, word: str) -> str:
        """`--key=value`, as agents of W&B write it, is the override key=value. Raises ConfigError for another option."""
        if word.startswith("--") and "=" in word:
            return word[2:]
        if word.startswith("-"):
            known = [opt for param in self.params for opt in param.opts if opt.startswith("--")]
            close = difflib.get_close_matches(word, known, n=1)
            raise ConfigError(
                f"{word!r} is not an option of this command{f', did you mean {close[0]}' if close else ''}: overrides have "
                "the form key=value or group=choice."
            )
        return word

    def load(self, place: str | None = None) -> Any:
        module, _, function = (place or self.function).partition(":")
        return getattr(importlib.import_module(f"m4train.commands.{module}"), function)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, options, and what the configuration holds that the command reads."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  m4train {example}\n" for example in self.examples))
        shown = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and p not in HYDRA]
        for title, params in (("Options", shown), ("Options of Hydra", HYDRA if self.reads else ())):
            if records := [record for param in params if (record := param.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)
        if self.more:
            more = self.load(self.more)
            if isinstance(more, dict):
                with formatter.section("Keys"):
                    formatter.write_dl(list(more.items()))
            else:
                formatter.write("\n" + more() + "\n")
        if self.reads:
            from m4train.config.compose import groups

            with formatter.section("Groups"):
                formatter.write_dl([(f"{group}=", ", ".join(choices)) for group, choices in groups().items()])
            with formatter.section("Keys"):
                formatter.write_dl(_keys(self.needs))
            formatter.write("\n`m4train config KEY` says what a key means.\n")


def _keys(needs: Sequence[str]) -> list[tuple[str, str]]:
    """The keys of the groups that a command reads, by their last words."""
    from m4train.config.describe import all_keys

    found = [("seed=0", "run_dir=runs/NAME  resume=auto|never|CHECKPOINT")]
    for group in ("trainer", "schedule", *needs) if "optimizer" in needs else needs:
        keys = [key.name.partition(".")[2] for key in all_keys() if key.name.startswith(f"{group}.") and not key.group]
        found.append((f"{group}.", ", ".join(name for name in keys if "." not in name)))
    return found


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
        launching.keep_log()
        return None
    return launching.launch(arguments, config.launch.processes or 1, Path(config.run_dir))
