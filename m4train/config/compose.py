"""From `conf/` and command-line overrides to one checked Config, with errors a person can act on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from m4train.config import Config
from m4train.config.adapter_start import take_adapter
from m4train.config.checks import check
from m4train.config.holdout import hold_out
from m4train.config.loading import (
    EXPERIMENT,
    Loader,
    Repository,
    Where,
    choices_of,
    groups_of,
    kept,
    parse,
    search_path,
)
from m4train.config.scale import scale_down
from m4train.config.stages import Outline, Staged, check_together, of_run, read_outline, stage_overrides
from m4train.config.start import composed_start, forget_scratch, starts_from, take_nearest
from m4train.config.texts import text_of
from m4train.config.trust import check_code
from m4train.config.values import Reader, fields_of
from m4train.errors import ConfigError
from m4train.json_files import read_mapping
from m4train.run_files import CONFIG, STAGES, STATE, inert, load_yaml

_RUN = "configuration_of_a_run"  # the root that stands for what a run was trained with
HERE = Where()


def resource_folder(name: str) -> Path:
    """The folder `conf` or `launch`: next to the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parent / name


def groups(where: Where | None = None) -> dict[str, list[str]]:
    """Every config group with its choices: those in the packaged `conf/`, or all that `where` finds."""
    if where is None:
        folder = resource_folder("conf")
        return {
            group.name: sorted(path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml"))
            for group in sorted(folder.iterdir())
            if group.is_dir() and _of_a_run(group.name)
        }
    repository = Repository(hydra_at(where).config_loader.repository, Config, hint_once)  # type: ignore[attr-defined]
    return {group: choices_of(repository, group) for group in groups_of(repository) if _of_a_run(group)}


def _of_a_run(group: str) -> bool:
    """Pipelines and the like, which are in `conf/` too, are composed by themselves."""
    return group == EXPERIMENT or group in fields_of(Config)


def hydra_at(where: Where, schema: Any = Config) -> Hydra:
    """Hydra with the search path of `where` and the types of `schema`, a dataclass that the root names as `schema` in its
    defaults list."""
    version.setbase("1.3")
    stored = ConfigStore.instance().repo.get("schema.yaml")
    if stored is None or OmegaConf.get_type(stored.node) is not schema:
        ConfigStore.instance().store(name="schema", node=schema)
    path = search_path(resource_folder("conf"), where)
    return Hydra("m4train", Loader(path, schema, hint_once))


def compose(overrides: list[str], where: Where = HERE, schema: Any = Config) -> Any:
    """The composition of the root of `where` with overrides, as an OmegaConf node. Raises ConfigError for what cannot be composed."""
    with explained(where):
        hydra = hydra_at(where, schema)
        composed = hydra.compose_config(where.name, overrides, RunMode.RUN, from_shell=False)
        HydraConfig.instance().set_config(composed)  # for ${hydra:...}
        with open_dict(composed):
            del composed["hydra"]
        return composed


def load_config(overrides: list[str], where: Where = HERE, trained: bool = False, sources: bool = True) -> Config:
    """Composes `conf/train.yaml` with Hydra overrides and checks the result. Of several stages it is the one that `stage=NAME`
    chooses, else the first, or the last for a command about what is `trained`. Without `sources`, data need not be named yet.

    Raises ConfigError, in one sentence, for an unknown key or choice, a wrong type, or a combination that cannot work.
    """
    _SAID.clear()
    outline = read_outline(lambda given: compose(given, where), overrides)
    if not outline.stages:
        return _loaded(overrides, where, outline.composed, sources)
    names, asked = outline.names(), outline.composed.stage
    if asked is None:
        asked = names[-1 if trained else 0]
        hint_once(f"this is about stage {asked}; stage=NAME chooses another of {', '.join(names)}.")
    number = names.index(asked)
    found = _stage(outline, number, overrides, where, sources)
    if number and not sources:  # whose start may not be there yet
        given = [override for override in overrides if override.partition("=")[0] != "stage"]
        vars(found)[BEFORE] = partial(load_config, [*given, f"stage={names[number - 1]}"], where, sources=False)
    return found


def load_stages(overrides: list[str], where: Where = HERE) -> Staged:
    """What `m4train train` trains: every stage of a configuration, the one of `stage=NAME`, or the run if it has no stages.

    A run_dir that holds a run without stages stands for the configuration it is trained with. Raises ConfigError as
    `load_config`, and for stages that ask for different numbers of processes.
    """
    given = {override.partition("=")[0]: text_of(override) for override in overrides}
    folder = Path(given.get("run_dir", ""))
    if "run_dir" in given and not given.keys() & {"experiment", "stages"} and (folder / STAGES).is_file():
        raise ConfigError(
            f"{folder} holds a run of several stages: give experiment=NAME again, which lists them; stage=NAME trains one."
        )
    if "run_dir" in given and (folder / CONFIG).is_file():
        config = load_known_config(overrides, where)
        return Staged(Path(config.run_dir), [config])
    _SAID.clear()
    outline = read_outline(lambda found: compose(found, where), overrides)
    if not outline.stages:
        config = _loaded(overrides, where, outline.composed)
        return Staged(Path(config.run_dir), [config])
    configs = [_stage(outline, number, overrides, where) for number in range(len(outline.stages))]
    check_together(configs)
    return Staged(Path(str(outline.composed.run_dir)), configs, outline.composed.stage)


def _stage(outline: Outline, number: int, overrides: list[str], where: Where, sources: bool = True) -> Config:
    """The configuration of one stage. Raises ConfigError that names the stage."""
    own, name = stage_overrides(outline, number, overrides), outline.stages[number].name
    try:
        config = _loaded(own, where, compose(own, where), sources)
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from error
    config.stage = name
    return config


def _loaded(overrides: list[str], where: Where, composed: Any, sources: bool = True) -> Config:
    """The checked object of a composition of `overrides`."""
    composed = composed_start(lambda given: compose(given, where), overrides, composed)
    take_nearest(composed, overrides)
    _say_what_is_kept(composed, overrides, where)
    config = _object(composed, where)
    take_adapter(config.adapter, overrides)
    scale_down(config, [override.lstrip("+").partition("=")[0] for override in overrides], resource_folder("conf"))
    hold_out(config.data)
    check(config, sources)
    return config


def load_run_config(overrides: list[str], where: Where = HERE) -> Config:
    """The configuration for a command about a run that was trained: `overrides` on top of what the run was trained with,
    except for how its processes were started.

    The run is `run_dir`, or the one of the checkpoint that `resume` names; a checkpoint that was moved away from its run
    brings its configuration itself. Overrides that choose an experiment or data are composed from the start, as for training. Raises
    ConfigError as `load_config` does, and if no run is named.
    """
    _SAID.clear()
    given = {override.partition("=")[0]: text_of(override) for override in overrides}
    if "experiment" in given or "data" in given or not given.keys() & {"run_dir", "resume"}:
        return load_config(overrides, where, trained=True)
    overrides = of_run(overrides)
    given = {override.partition("=")[0]: text_of(override) for override in overrides}
    stored, file = _stored(Path(given["run_dir"]) if "run_dir" in given else None, Path(given.get("resume", "auto")))
    merged = OmegaConf.create(inert(_read_stored(stored)))
    if "model" in merged:
        forget_scratch(merged.model, starts_from(overrides) is not None)
    chosen = groups(where).keys() & given.keys()  # a choice stands for the whole group
    values = {key: value for key, value in OmegaConf.to_container(merged).items() if key not in chosen}  # type: ignore[union-attr]
    ConfigStore.instance().store(name=_RUN, node={"defaults": ["schema", "_self_"], **values})
    added = [f"+{override}" if override.partition("=")[0] in chosen else override for override in overrides]
    composed = compose(added, Where(where.folders, _RUN))
    take_nearest(composed, overrides)
    config = _object(composed, where)
    check_code(config, file, given, resource_folder("conf"))
    check(config)
    return config


def load_known_config(overrides: list[str], where: Where = HERE, sources: bool = True) -> Config:
    """The configuration for a command that looks at a run, or goes on with it, by `run_dir` alone once that holds one; of a run
    that has not begun as for training."""
    if not any(override.startswith("experiment=") for override in overrides):
        overrides = of_run(overrides)
    run_dirs = [text_of(override) for override in overrides if override.startswith("run_dir=")]
    begun = bool(run_dirs) and (Path(run_dirs[-1]) / CONFIG).is_file()
    return load_run_config(overrides, where) if begun else load_config(overrides, where, sources=sources)


def stored_config(values: Any, where: Path) -> Config:
    """The configuration that a checkpoint or a config.yaml holds; keys it lacks have their defaults.

    Raises ConfigError, naming `where`, for values that this version does not know.
    """
    try:
        return _object(completed(values))
    except ConfigError as error:
        raise ConfigError(f"{where} was written by another version of m4train ({error}).") from error


def completed(values: Any) -> Any:
    """A stored configuration as an OmegaConf node, with the default of every key it lacks. Raises ConfigError as `stored_config`."""
    with explained():
        merged = OmegaConf.merge(OmegaConf.structured(Config), inert(_read_stored(values)))
        forget_scratch(merged.model)
        return merged


def _read_stored(values: Any) -> Any:
    values = OmegaConf.to_container(values) if OmegaConf.is_config(values) else values
    return Reader(Config).read(values, values, [])


def _say_what_is_kept(composed: Any, overrides: list[str], where: Where) -> None:
    if any("={" in override for override in overrides):
        for sentence in kept(composed, parsed(overrides, where), Config):
            hint_once(sentence)


def parsed(overrides: list[str], where: Where = HERE, schema: Any = Config) -> list[Override]:
    """The overrides as Hydra parses them, their values read by the schema. Raises ConfigError for a wrong key, choice or form."""
    loader: Any = hydra_at(where, schema).config_loader
    return loader._parse_overrides_and_create_caching_repo(where.name, overrides)[0]


def _object(composed: Any, where: Where = HERE) -> Config:
    with explained(where):
        config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def parsed_override(override: str) -> tuple[str, Any]:
    """Key or group, and value, of one override. Raises ConfigError if it is not one, or gives several values."""
    parsed = parse(override)
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{override!r} gives several values: give one, or a list in brackets, or quote what holds commas."
        )
    return parsed.key_or_group, parsed.value()


@contextmanager
def explained(where: Where = HERE) -> Iterator[None]:
    """Turns what Hydra and OmegaConf refuse into one sentence."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, where)) from error
    except YAMLError as error:
        raise ConfigError(f"A file of the configuration is not YAML: {' '.join(str(error).split())}.") from error


def _stored(run_dir: Path | None, checkpoint: Path) -> tuple[dict[str, Any], Path]:
    """What config.yaml of a run holds, or the state of a checkpoint, without `launch`: how many processes trained it says
    nothing about those of another command; and the file it is in."""
    where, state = (run_dir or checkpoint.resolve().parent.parent) / CONFIG, checkpoint / STATE
    folder = where.parent
    stored: dict[str, Any] | None = None
    if where.is_file():
        stored = load_yaml(where)
    elif state.is_file():
        where, found = state, read_mapping(state).get("config")
        stored = {**(found if isinstance(found, dict) else {}), "run_dir": str(folder)}
    if stored is not None:
        return {key: value for key, value in stored.items() if key != "launch"}, where
    raise ConfigError(
        f"{folder} holds no config.yaml: train first, or set run_dir to a trained run, or resume to a checkpoint."
    )


def hint_once(sentence: str) -> None:
    """Prints a hint, on the first of several processes alone, and once in a command."""
    if os.environ.get("RANK", "0") == "0" and sentence not in _SAID:
        _SAID.add(sentence)
        print(f"m4train: {sentence}", file=sys.stderr)


BEFORE = "composes_the_stage_before"  # an attribute of configurations that is not a key: called, it does what it says
_SAID: set[str] = set()  # a configuration is composed more than once in a command


def save_config(config: Config, path: Path) -> None:
    """Writes the composed configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def _explain(error: Exception, where: Where) -> str:
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
        return (
            f"{group} is not chosen: add {group}=... ({', '.join(groups(where).get(group, []))}), or an experiment=... that "
            "chooses it."
        )
    if first.startswith("Ambiguous value") or "requires --multirun" in first:
        given = first.split("'")[1]
        return (
            f"{given!r} gives several values: give one, or a list in brackets, or quote what holds commas, or start a run for each "
            "value with -m."
        )
    return f"{key}: {first}" if key else first
