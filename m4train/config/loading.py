"""Hydra's config loader with the types of a schema: where configurations are searched for, and what is read out of files and
overrides.

Everything about groups, defaults lists, packages, search paths and the grammar of overrides is Hydra's own. Added is what a
checked schema allows: values are read as `values.py` says, keys inside mappings with open names need no `+`, a path to a
file may stand for a choice, and experiments need no package header.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser import overrides_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from m4train.config.texts import as_text
from m4train.config.values import Reader, fields_of, first_open, nested, suggest
from m4train.errors import ConfigError

CONFIG_PATH = "M4TRAIN_CONFIG_PATH"  # folders like conf/, as in PATH
OWN = "conf"  # the folder of the working folder that is searched too
EXPERIMENT = "experiment"
_TEXTS = getattr(
    yaml, "CBaseLoader", yaml.BaseLoader
)  # takes every value for text; in C where PyYAML was built with it
_BRACES = re.compile(r"\{[^{}:]*(\.\.|,)[^{}:]*\}")  # of a pattern for shards, which Hydra takes for a mapping
_INNER = re.compile(
    r"""(?<=[\[,:\s])[\w.~+@/-]+=[^\s,\[\]{}'"]+"""
)  # an override within a list or mapping, without quotes


@dataclass(frozen=True)
class Where:
    """Where a configuration is composed from: folders given on the command line, and the name of the root."""

    folders: tuple[str, ...] = ()
    name: str = "train"


def search_path(packaged: Path, where: Where) -> ConfigSearchPath:
    """The packaged folder, then those of the command line, of M4TRAIN_CONFIG_PATH, and `conf` of the working folder. Raises
    ConfigError for one that is named and is not there."""
    path = create_config_search_path(str(packaged))
    named = [("--config-dir", folder) for folder in where.folders]
    named += [(CONFIG_PATH, folder) for folder in os.environ.get(CONFIG_PATH, "").split(os.pathsep) if folder]
    for provider, folder in named:
        if not Path(folder).is_dir():
            raise ConfigError(
                f"{provider} names {folder}, which is not a folder: give one that holds groups, as conf/ does."
            )
    of_ours = Path("m4train/config/schema.py").is_file()  # a checkout, whose conf/ belongs to the package that it holds
    own = [("working folder", OWN)] if Path(OWN).is_dir() and not of_ours else []
    known = {packaged.resolve()}
    for provider, folder in named + own:
        real = Path(folder).resolve()
        if real not in known:
            known.add(real)
            path.prepend(provider=provider, path=f"file://{real}", anchor=SearchPathQuery(provider="schema"))
    return path


class Loader(ConfigLoaderImpl):
    """Hydra's loader for one schema; `say` is called with hints."""

    def __init__(self, path: ConfigSearchPath, schema: Any, say: Callable[[str], None]) -> None:
        super().__init__(path)
        self.schema, self.say = schema, say

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed = [parse(as_text(override)) for override in overrides]
        repository = Repository(self.repository, self.schema, self.say)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said below, as a refusal
            self._process_config_searchpath(config_name, parsed, repository)
        for source in repository.get_sources():
            if source.provider.startswith("hydra.searchpath") and not source.available():
                raise ConfigError(f"hydra.searchpath names {source.path}, which is not a folder of configurations.")
        return [self._read(override, repository) for override in parsed], repository

    def _read(self, override: Override, repository: Repository) -> Override:
        """The override with its value read by the schema. Raises ConfigError if there is no such key or choice."""
        key = override.key_or_group
        if override.is_hydra_override():
            return override
        if repository.group_exists(key) or (key == EXPERIMENT and override.value_type is not None):
            _check_choice(override, repository)
            return override
        reader = Reader(self.schema, say=self.say, others=partial(groups_of, repository))
        path, value = key.split("."), cast(Any, override.value())
        if isinstance(value, ChoiceSweep):  # every value of a sweep is read when its job is composed
            value = value.list[0] if value.list else None
        elif override.is_sweep_override():
            value = None
        deep = nested(path, value)
        deep = reader.read(deep, nested(path, _written(override)), [])
        path = _along(deep, len(path))
        read = copy(override)
        read.key_or_group = ".".join(path)
        if override.is_delete() or override.is_sweep_override():
            return read
        for name in path:
            deep = deep[int(name) if name not in deep else name]
        opened = first_open(self.schema, path)
        if opened is not None and (opened < len(path) or isinstance(deep, dict)):
            deep = nested([_number(name) for name in path[opened:]], deep)
            read.key_or_group = ".".join(path[:opened])
            read.type = OverrideType.FORCE_ADD if read.type == OverrideType.CHANGE else read.type
        read._value = deep
        return read


class Repository(CachingConfigRepository):
    """The configurations on the search path, with values read by the schema, and files that a choice names by their path."""

    def __init__(self, delegate: Any, schema: Any, say: Callable[[str], None]) -> None:
        self.delegate, self.cache = copy(delegate), {}  # hydra.searchpath gives the copy a list of sources of its own
        self.schema, self.say = schema, say

    def config_exists(self, config_path: str) -> bool:
        return super().config_exists(config_path) or named_file(config_path) is not None

    def load_config(self, config_path: str) -> ConfigResult | None:
        key = f"config_path={config_path}"
        if key not in self.cache:
            file = None if super().config_exists(config_path) else named_file(config_path)
            result = super().load_config(config_path) if file is None else _alone(file)
            folder = None if result is None or result.provider == "hydra" else _folder(result.path)
            if result is not None and folder is not None:
                file = file or folder / f"{config_path.removesuffix('.yaml')}.yaml"
                self._alone_by_its_name(config_path, file)
                self._read(result, config_path, file)
            self.cache[key] = result
        return self.cache[key]

    def _alone_by_its_name(self, config_path: str, file: Path) -> None:
        """Raises ConfigError if another folder of the search path has another file of this name, which would not be read."""
        for source in self.get_sources():
            other = Path(source.path) / f"{config_path.removesuffix('.yaml')}.yaml"
            hidden = source.scheme() == "file" and other.is_file() and other.resolve() != file.resolve()
            if hidden and other.read_bytes() != file.read_bytes():
                if "/" not in config_path:
                    self.say(f"{other} is not read, {file} is: give it another name, and choose it by --config-name.")
                    continue
                raise ConfigError(
                    f"{config_path} is there twice, in {file} and in {other}: give your own another name."
                )

    def _read(self, result: ConfigResult, config_path: str, file: Path) -> None:
        """Reads the values of a file by the schema; experiments go to the root unless their header says otherwise."""
        if config_path.startswith(f"{EXPERIMENT}/") and result.header["package"] is None:
            result.header["package"] = "_global_"
        package = result.header["package"] or config_path.rpartition("/")[0].split("//")[0].replace("/", ".")
        path = [] if package in ("_global_", "") else package.split(".")
        if not OmegaConf.is_dict(result.config) or (path and path[0] not in fields_of(self.schema)):
            return
        values: Any = OmegaConf.to_container(result.config)
        hydra = {"hydra": values.pop("hydra")} if not path and "hydra" in values else {}
        written = yaml.load(file.read_text(encoding="utf-8"), _TEXTS)
        reader = Reader(self.schema, f"{file}: ", self.say, partial(groups_of, self))
        result.config = OmegaConf.create(reader.read(values, written, path) | hydra)


def _folder(path: str) -> Path | None:
    """The folder that a part of the search path stands for, file://FOLDER or pkg://PACKAGE; None if it is not one of files."""
    scheme, _, place = path.partition("://")
    if scheme == "pkg":
        place = str(importlib.resources.files(place.replace("/", ".")))
    return Path(place) if scheme in ("file", "pkg") else None


def named_file(config_path: str) -> Path | None:
    """The file that a choice names by its path: the part after the group, if it ends in .yaml and is there."""
    name = config_path.partition("/")[2]
    return Path(name) if name.endswith((".yaml", ".yml")) and Path(name).is_file() else None


def _alone(file: Path) -> ConfigResult | None:
    """A file that is in no folder of the search path."""
    path = ConfigSearchPathImpl()
    path.append("path of a file", f"file://{file.resolve().parent}")
    return ConfigRepository(path).load_config(file.name)


def groups_of(repository: Any) -> list[str]:
    """The groups on the search path whose choices can be given, without Hydra's own."""
    return [name for name in repository.get_group_options("", ObjectType.GROUP) if name != "hydra"]


def choices_of(repository: Any, group: str) -> list[str]:
    """The choices of a group, those in its folders by their path."""
    found = list(repository.get_group_options(group, ObjectType.CONFIG))
    for folder in repository.get_group_options(group, ObjectType.GROUP):
        found += [f"{folder}/{choice}" for choice in choices_of(repository, f"{group}/{folder}")]
    return found


def _check_choice(override: Override, repository: Repository) -> None:
    key, value = override.key_or_group, override.value()
    if isinstance(value, dict):
        raise ConfigError(
            f"{key} is a group: choose one of {', '.join(choices_of(repository, key))}, and set single keys, such as "
            f"{key}.{next(iter(value), 'KEY')}=VALUE."
        )
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and not repository.config_exists(f"{key}/{name}"):
            if name.endswith((".yaml", ".yml")):
                raise ConfigError(f"{key}={name} is not a file.")
            choices = choices_of(repository, key)
            raise ConfigError(
                f"{key}={name} is not a choice{suggest(name, choices)}; {key} can be {', '.join(choices)}."
            )


def parse(override: str) -> Override:
    """Raises ConfigError, with what to write instead, for what Hydra's grammar does not take."""
    if override.startswith("-"):
        raise ConfigError(
            f"{override!r} is not an option of this command: overrides have the form key=value or group=choice."
        )
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"{override!r} is not an override: {_why_not(override)}.") from error


def _why_not(override: str) -> str:
    pattern = _BRACES.search(override.partition("=")[2])
    inner = _INNER.search(override.partition("=")[2]) if pattern is None else None
    if inner is not None:
        return f'put quotes around the text that holds "=", within those of the shell: "{inner[0]}"'
    if pattern is None:
        return "write key=value or group=choice"
    return f'put quotes around the whole path that holds {pattern[0]}, within those of the shell: path="a-{pattern[0]}.tar"'


class _Characters(HydraOverrideVisitor):
    """Reads an override without taking anything in it for a number, a truth value or null."""

    def _createPrimitive(self, ctx: Any) -> Any:
        value = super()._createPrimitive(ctx)
        return ctx.getText().strip() if isinstance(value, (bool, int, float)) else value


def _written(override: Override) -> Any:
    """The value of an override with the characters of everything that is not in quotes."""
    if override.value_type is None or override.is_sweep_override() or override.input_line is None:
        return None
    if not isinstance(override.value(), (dict, list)):
        return override.input_line.partition("=")[2].strip()
    parser = OverridesParser.create()
    lexer = overrides_parser.OverrideLexer(overrides_parser.InputStream(override.input_line))
    tree = overrides_parser.OverrideParser(overrides_parser.CommonTokenStream(lexer)).override()
    try:
        return _Characters(parser.functions).visit(tree).value()
    except HydraException:  # a cast, such as int(3): what it gives is meant
        return override.value()


def _along(value: Any, length: int) -> list[str]:
    """The names that lead `length` levels into mappings of one entry each."""
    path: list[str] = []
    for _ in range(length):
        (name,) = value
        path.append(str(name))
        value = value[name]
    return path


def _number(name: str) -> Any:
    return int(name) if name.isdigit() else name


def kept(composed: Any, overrides: list[Override], schema: Any) -> Iterator[str]:
    """A sentence for each mapping that an override was merged into and that holds more than what was given."""
    for override in overrides:
        path, value = override.key_or_group.split("."), override.value()
        if override.is_hydra_override() or override.is_delete() or not isinstance(value, dict):
            continue
        if first_open(schema, path) != len(path):
            continue
        others = [str(name) for name in OmegaConf.select(composed, override.key_or_group) or {} if name not in value]
        given = ", ".join(map(str, value))
        if others and "={" in (override.input_line or ""):
            yield (
                f"{override.key_or_group}={{{given}: ...}} is merged with what was there: {', '.join(others)} "
                f"(~{override.key_or_group}.{others[0]} takes one out)."
            )
