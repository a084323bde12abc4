"""From `conf/` and command-line overrides to one checked Config, with errors a person can act on."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from m4train.config import Config
from m4train.config.adapter_start import take_adapter
from m4train.config.checks import check
from m4train.config.renamed import RENAMED, schema_with_old_keys, take_old_keys, with_old_keys
from m4train.config.start import composed_start, forget_scratch, starts_from
from m4train.config.texts import as_text, text_of
from m4train.errors import ConfigError
from m4train.json_files import read_mapping
from m4train.run_files import CONFIG, STATE, load_yaml

_BRACES = re.compile(r"\{[^{}:]*(\.\.|,)[^{}:]*\}")  # of a pattern for shards, which Hydra takes for a mapping


def resource_folder(name: str) -> Path:
    """The folder `conf` or `launch`: next to the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parent / name


def groups() -> dict[str, list[str]]:
    """Every config group with its choices, as they are in `conf/`."""
    folder = resource_folder("conf")
    return {
        group.name: sorted(choice.stem for choice in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir() and group.name != "pipeline"  # not of a run, see data_pipelines/frame/config.py
    }


def load_config(overrides: list[str]) -> Config:
    """Composes `conf/train.yaml` with Hydra overrides and checks the result.

    Raises ConfigError, in one sentence, for an unknown key or choice, a wrong type, or a combination that cannot work.
    """
    choices: list[str] = []
    keys: list[str] = []
    overrides = [as_text(override) for override in overrides]
    for override in overrides:
        name = _checked(override)
        (choices if name in groups() or override.startswith("~") else keys).append(override)
    ConfigStore.instance().store(name="schema", node=schema_with_old_keys())
    with explained(), initialize_config_dir(str(resource_folder("conf")), version_base="1.3"):
        composed = composed_start(lambda given: hydra_compose("train", given), choices, keys)
        take_old_keys(composed, _hint_once)
        for override in keys:
            _apply(composed, override, merge=True)
        config = _object(composed)
    take_adapter(config.adapter, keys)
    check(config)
    return config


def load_run_config(overrides: list[str]) -> Config:
    """The configuration for a command about a run that was trained: `overrides` on top of what the run was trained with,
    except for how its processes were started.

    The run is `run_dir`, or the one of the checkpoint that `resume` names; a checkpoint that was moved away from its run
    brings its configuration itself. Overrides that choose an experiment or data are composed from the start, as for training. Raises
    ConfigError as `load_config` does, and if no run is named.
    """
    overrides = [as_text(override) for override in overrides]
    given = {override.partition("=")[0]: text_of(override) for override in overrides}
    if "experiment" in given or "data" in given or not given.keys() & {"run_dir", "resume"}:
        return load_config(overrides)
    for override in overrides:
        _checked(override)
    stored = _stored(Path(given["run_dir"]) if "run_dir" in given else None, Path(given.get("resume", "auto")))
    with explained():
        merged = OmegaConf.merge(schema_with_old_keys(), stored)
        take_old_keys(merged)
        forget_scratch(merged.model, starts_from(overrides) is not None)
        for override in overrides:
            _apply(merged, override, merge=False)
        config = _object(merged)
    check(config)
    return config


def load_known_config(overrides: list[str]) -> Config:
    """The configuration for a command that looks at a run, or goes on with it, by `run_dir` alone once that holds one; of a run
    that has not begun as for training."""
    run_dirs = [text_of(override) for override in overrides if override.startswith("run_dir=")]
    begun = bool(run_dirs) and (Path(run_dirs[-1]) / CONFIG).is_file()
    return load_run_config(overrides) if begun else load_config(overrides)


def stored_config(values: Any, where: Path) -> Config:
    """The configuration that a checkpoint or a config.yaml holds; keys it lacks have their defaults.

    Raises ConfigError, naming `where`, for values that this version does not know.
    """
    try:
        merged = OmegaConf.merge(schema_with_old_keys(), _typed(values, Config))
        take_old_keys(merged)
        forget_scratch(merged.model)
        return _object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where} was written by another version of m4train ({_explain(error)}).") from error


def _object(composed: Any) -> Config:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


@contextmanager
def explained() -> Iterator[None]:
    """Turns what Hydra and OmegaConf refuse into one sentence."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def _stored(run_dir: Path | None, checkpoint: Path) -> Any:
    """What config.yaml of a run holds, or the state of a checkpoint, without `launch`: how many processes trained it says
    nothing about those of another command."""
    state = checkpoint / STATE
    folder = run_dir or checkpoint.resolve().parent.parent
    stored: Any = None
    if (folder / CONFIG).is_file():
        stored = load_yaml(folder / CONFIG)
    elif state.is_file():
        stored = _typed({**(read_mapping(state).get("config") or {}), "run_dir": str(folder)}, Config)
    if stored is not None:
        return {key: value for key, value in stored.items() if key != "launch"}
    raise ConfigError(
        f"{folder} holds no config.yaml: train first, or set run_dir to a trained run, or resume to a checkpoint."
    )


def _apply(config: Any, override: str, merge: bool) -> None:
    """Sets one key, or all keys of a group from the file of its choice; `merge` keeps what a mapping held before."""
    parsed = OverridesParser.create().parse_override(override)
    key = parsed.key_or_group
    value: Any = parsed.value()
    if key in groups():
        choice = OmegaConf.load(resource_folder("conf") / key / f"{value}.yaml")
        value = OmegaConf.merge(schema_with_old_keys()[key], choice)
    else:
        path, inside = _split(key)
        # OmegaConf makes no new entry of a mapping from a key that leads into it: it is given as a mapping to merge
        for name in reversed(inside):
            value = {name: value}
        key, merge = ".".join(path), merge or bool(inside)
        value = _typed(value, _hint(path), key)
    OmegaConf.update(with_old_keys(config), key, value, merge=merge, force_add=True)
    take_old_keys(config, _hint_once)


def _hint_once(sentence: str) -> None:
    """Prints a hint, on the first of several processes alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"m4train: {sentence}", file=sys.stderr)


def _split(key: str) -> tuple[list[str], list[str]]:
    """The part of a key that leads to the first mapping with open names, and the names inside it."""
    path = key.split(".")
    for end in range(1, len(path)):
        if typing.get_origin(_hint(path[:end])) is dict:
            return path[:end], path[end:]
    return path, []


def _hint(path: list[str]) -> Any:
    """The type that the schema gives a key; Any if it leads into something that is not a group."""
    hint: Any = Config
    for name in path:
        hint = _fields(hint).get(name, Any)
    return hint


def _typed(value: Any, hint: Any, key: str = "") -> Any:
    """The value with what OmegaConf does not convert within mappings: whole numbers to float, and keys to numbers, of which
    JSON makes strings."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, dict):
        return value
    inside = f"{key}." if key else ""
    if dataclasses.is_dataclass(hint):
        hints = _fields(hint)
        return {name: _typed(inner, hints.get(name, Any), f"{inside}{name}") for name, inner in value.items()}
    if typing.get_origin(hint) is not dict:
        return value
    names, of = typing.get_args(hint)
    if names is int:
        for name in value:
            if not str(name).isdigit():
                raise ConfigError(f"{inside}{name} is not a configuration key: {key} takes whole numbers for keys.")
        value = {int(name): inner for name, inner in value.items()}
    return {name: _typed(inner, of, f"{inside}{name}") for name, inner in value.items()}


def save_config(config: Config, path: Path) -> None:
    """Writes the composed configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def parsed_override(override: str) -> tuple[str, Any]:
    """Key or group, and value, of one override. Raises ConfigError if it is not one, or gives several values."""
    if override.startswith("-"):
        raise ConfigError(
            f"{override!r} is not an option of this command: overrides have the form key=value or group=choice."
        )
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"{override!r} is not an override: {_why_not(override)}.") from error
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{override!r} gives several values: give one, or a list in brackets, or quote what holds commas."
        )
    return parsed.key_or_group, parsed.value()


def _checked(override: str) -> str:
    """The key or group that an override sets. Raises ConfigError if there is no such key or choice."""
    key, value = parsed_override(override)
    choices = groups().get(key)
    if choices is not None:
        if isinstance(value, str) and value not in choices:
            raise ConfigError(
                f"{key}={value} is not a choice{_suggest(value, choices)}; {key} can be {', '.join(choices)}."
            )
        return key
    for path in ([*key.split("."), *inner] for inner in _paths(value)):
        name = ".".join(path)
        if not _known(Config, path) and name not in RENAMED:
            raise ConfigError(f"{name} is not a configuration key{_suggest(name, _all_keys(Config, path))}.")
    return key


def _why_not(override: str) -> str:
    pattern = _BRACES.search(override.partition("=")[2])
    if pattern is None:
        return "write key=value or group=choice"
    return f'put quotes around the whole path that holds {pattern[0]}, within those of the shell: path="a-{pattern[0]}.tar"'


def _paths(value: Any) -> Iterator[list[str]]:
    """The names that lead to every value within nested mappings."""
    if not isinstance(value, dict) or not value:
        yield []
        return
    for name, inner in value.items():
        yield from ([str(name), *rest] for rest in _paths(inner))


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        leaf = word.rsplit(".", 1)[-1]
        close = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    return (
        f" (did you mean {close[0]}?)"
        if close
        else " (docs/configuration.md lists all keys, `m4train train --help` the choices)"
    )


def _fields(node: Any) -> dict[str, Any]:
    return typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}


def _known(node: Any, path: list[str]) -> bool:
    """Whether `path` leads somewhere from the type `node`; below a mapping or a list any name is allowed."""
    if not path:
        return True
    if dataclasses.is_dataclass(node):
        hints = _fields(node)
        return path[0] in hints and _known(hints[path[0]], path[1:])
    origin = typing.get_origin(node)
    if origin in (dict, list):
        return _known(typing.get_args(node)[-1], path[1:])
    return node is Any


def _all_keys(node: Any, meant: list[str], prefix: str = "") -> list[str]:
    """The keys of the schema and the groups; within mappings with open names, those under the names that `meant` has."""
    keys = [] if prefix else list(groups())
    for name, hint in _fields(node).items():
        keys.append(prefix + name)
        inner, rest = f"{prefix}{name}.", meant[1:] if meant[:1] == [name] else []
        if typing.get_origin(hint) is dict and rest:
            hint, inner, rest = typing.get_args(hint)[1], f"{inner}{rest[0]}.", rest[1:]
        keys.extend(_all_keys(hint, rest, inner))
    return keys


def _explain(error: Exception) -> str:
    """One sentence from the several lines of a Hydra or OmegaConf error."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = getattr(cause, "full_key", None)
    if not key:
        key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key")), None)
    first = lines[0] if lines else type(cause).__name__
    if "must specify" in first:
        group = first.split("'")[1]
        return f"{group} is not chosen: add {group}=... ({', '.join(groups().get(group, []))}), or an experiment=... that chooses it."
    return f"{key}: {first}" if key else first
