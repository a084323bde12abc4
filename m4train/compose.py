"""From `conf/` and command-line overrides to one checked Config, with errors a person can act on."""

from __future__ import annotations

import dataclasses
import difflib
import json
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
from m4train.config_checks import check
from m4train.errors import ConfigError


def resource_folder(name: str) -> Path:
    """The folder `conf` or `launch`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parent / name


def groups() -> dict[str, list[str]]:
    """Every config group with its choices, as they lie in `conf/`."""
    folder = resource_folder("conf")
    return {
        group.name: sorted(choice.stem for choice in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }


def load_config(overrides: list[str]) -> Config:
    """Composes `conf/train.yaml` with Hydra overrides and checks the result.

    Raises ConfigError, in one sentence, for an unknown key or choice, a wrong type, or a combination that cannot work.
    """
    overrides = [_checked(override) for override in overrides]
    ConfigStore.instance().store(name="schema", node=Config)
    with _explained(), initialize_config_dir(str(resource_folder("conf")), version_base="1.3"):
        config = _object(hydra_compose("train", overrides))
    check(config)
    return config


def load_run_config(overrides: list[str]) -> Config:
    """The configuration for a command about a run that was trained: `overrides` on top of what the run was trained with,
    but for how its processes were started.

    The run is `run_dir`, or the one of the checkpoint that `resume` names; a checkpoint that was moved away from its run
    brings its configuration itself. Overrides that choose an experiment or data compose anew, as for training. Raises
    ConfigError as `load_config` does, and where no run is named.
    """
    given = dict(override.partition("=")[::2] for override in overrides)
    if "experiment" in given or "data" in given or not given.keys() & {"run_dir", "resume"}:
        return load_config(overrides)
    overrides = [_checked(override) for override in overrides]
    stored = _stored(Path(given["run_dir"]) if "run_dir" in given else None, Path(given.get("resume", "auto")))
    with _explained():
        merged = OmegaConf.merge(OmegaConf.structured(Config), stored)
        for override in overrides:
            _apply(merged, override)
        config = _object(merged)
    check(config)
    return config


def stored_config(values: Any, where: Path) -> Config:
    """The configuration that a checkpoint or a config.yaml holds; keys it lacks have their defaults.

    Raises ConfigError, naming `where`, for values that this version does not know.
    """
    try:
        return _object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where} was written by another version of m4train ({_explain(error)}).") from error


def _object(composed: Any) -> Config:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what Hydra and OmegaConf refuse into one sentence."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def _stored(run_dir: Path | None, checkpoint: Path) -> Any:
    """What config.yaml of a run holds, or the state of a checkpoint, but for `launch`: how many processes trained it says
    nothing about those of another command."""
    state = checkpoint / "state.json"
    folder = run_dir or checkpoint.resolve().parent.parent
    stored: Any = None
    if (folder / "config.yaml").is_file():
        stored = OmegaConf.load(folder / "config.yaml")
    elif state.is_file():
        stored = {**json.loads(state.read_text(encoding="utf-8"))["config"], "run_dir": str(folder)}
    if stored is not None:
        return {key: value for key, value in stored.items() if key != "launch"}
    raise ConfigError(
        f"{folder} holds no config.yaml: train first, or set run_dir to a trained run, or resume to a checkpoint."
    )


def _apply(config: Any, override: str) -> None:
    """Sets one key, or all keys of a group from the file of its choice."""
    parsed = OverridesParser.create().parse_override(override)
    key = parsed.key_or_group
    value: Any = parsed.value()
    if key in groups():
        choice = OmegaConf.load(resource_folder("conf") / key / f"{value}.yaml")
        value = OmegaConf.merge(OmegaConf.structured(getattr(Config(), key)), choice)
    OmegaConf.update(config, key, value, merge=False, force_add=True)


def save_config(config: Config, path: Path) -> None:
    """Writes the composed configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def _checked(override: str) -> str:
    """The override, marked as one that may add a key where the schema leaves the names open (model.architecture...)."""
    if override.startswith("-"):
        raise ConfigError(
            f"{override!r} is no option of this command: overrides have the form key=value or group=choice."
        )
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"{override!r} is not an override: write key=value or group=choice.") from error
    key = parsed.key_or_group
    choices = groups().get(key)
    if choices is not None:
        choice = parsed.value()
        if isinstance(choice, str) and choice not in choices:
            raise ConfigError(
                f"{key}={choice} is no choice{_suggest(choice, choices)}; {key} can be {', '.join(choices)}."
            )
        return override
    if not _known(Config, key.split(".")):
        raise ConfigError(f"{key} is not a configuration key{_suggest(key, _all_keys(Config) + list(groups()))}.")
    return override if override[0] in "+~" else f"++{override}"


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        leaf = word.rsplit(".", 1)[-1]
        close = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    return f" (did you mean {close[0]}?)" if close else " (`m4train train --help` lists them)"


def _fields(node: Any) -> dict[str, Any]:
    return typing.get_type_hints(node) if dataclasses.is_dataclass(node) else {}


def _known(node: Any, path: list[str]) -> bool:
    """Whether `path` leads somewhere from the type `node`; below a mapping or a list any name may stand."""
    if not path:
        return True
    if dataclasses.is_dataclass(node):
        hints = _fields(node)
        return path[0] in hints and _known(hints[path[0]], path[1:])
    origin = typing.get_origin(node)
    if origin in (dict, list):
        return _known(typing.get_args(node)[-1], path[1:])
    return node is Any


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in _fields(node).items():
        keys.append(prefix + name)
        keys.extend(_all_keys(hint, f"{prefix}{name}."))
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
