"""Runs of several stages: what the configuration of each is, and where it lies.

A stage is a run like any other, in `run_dir/NAME`, that starts from the weights of the one before. Its configuration is
composed by itself: its experiment, its overrides, those of the command line, and what makes it a stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from m4train.config.require import leaves, one_of, require
from m4train.config.schema import Config, StageConfig
from m4train.config.texts import text_of
from m4train.config.wandb_keys import said
from m4train.errors import ConfigError
from m4train.run_files import CONFIG, STAGES, stage_names

Compose = Callable[[list[str]], Any]
_OF_THE_WHOLE = ("experiment", "name", "run_dir", "stage", "stages")  # what a stage has a value of its own for
_ANY_DATA = "data=own"  # each stage chooses its own
_START = "model.pretrained"


@dataclass(frozen=True)
class Staged:
    """What `m4train train` trains: the configurations of all stages, in their order, or the one of a run without stages.

    `folder` is run_dir of the whole; `asked` the stage that is trained alone.
    """

    folder: Path
    configs: list[Config]
    asked: str | None = None

    @property
    def whole(self) -> bool:
        """Whether there are stages."""
        return self.configs[0].stage is not None


@dataclass(frozen=True)
class Outline:
    """The composition of a whole, and the stages that it lists; none of a run without stages."""

    composed: Any
    stages: list[StageConfig]

    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    def run_dir(self, stage: StageConfig) -> str:
        return f"{self.composed.run_dir}/{stage.name}"


def read_outline(compose: Compose, overrides: Sequence[str]) -> Outline:
    """Composes `overrides`. A configuration with stages need not choose data. Raises ConfigError for stages that cannot be."""
    given = list(overrides)
    try:
        composed = compose(given)
    except ConfigError:
        if "data" in _keys(given):
            raise
        try:
            composed = compose([*given, _ANY_DATA])
        except ConfigError:
            composed = None
        if composed is None or not composed.stages:
            raise
    stages = _listed(composed)
    outline = Outline(composed, stages)
    _check(outline, given)
    if any(stage.experiment for stage in stages):
        _check_nothing_lost(compose, outline, given)
    return outline


def _listed(composed: Config) -> list[StageConfig]:
    """The stages of a composition; what they refer to is resolved in each."""
    listed: Any = OmegaConf.to_container(composed.stages, resolve=False)
    return [StageConfig(**stage) for stage in listed]


def _check(outline: Outline, given: list[str]) -> None:
    names, asked = outline.names(), outline.composed.stage
    require(bool(names) or asked is None, f"stage is {asked}, but the configuration lists no stages: leave it out.")
    for number, stage in enumerate(outline.stages):
        require(
            re.fullmatch(r"[A-Za-z0-9_][\w.-]*", stage.name) is not None and stage.name != CONFIG,
            f"stages.{number}.name is {stage.name!r}, but must be a name for a folder, of letters, digits, '_', '-' and '.'.",
        )
        require(names.count(stage.name) == 1, f"stages has {stage.name} twice: give each stage a name of its own.")
        forced = (*_OF_THE_WHOLE, _START) if number else _OF_THE_WHOLE
        own = [key for key in _keys(stage.overrides) if key in forced]
        require(
            not own,
            f"stages.{number}.overrides sets {', '.join(own)}, which follows from being stage {stage.name}: leave it out.",
        )
    if asked is not None:
        one_of("stage", asked, tuple(names))


def _check_nothing_lost(compose: Compose, outline: Outline, given: list[str]) -> None:
    """Refuses keys next to stages that have experiments of their own: nothing would take them."""
    plain = [override for override in given if _key(override) not in _OF_THE_WHOLE]
    data = [] if "data" in _keys(given) else [_ANY_DATA]
    before, now = (_flat(composed) for composed in (compose([*plain, *data]), outline.composed))
    set_here = [key for key in now if now[key] != before.get(key) and key.partition(".")[0] not in _OF_THE_WHOLE]
    stage = next(stage for stage in outline.stages if stage.experiment)
    require(
        not set_here,
        f"{', '.join(set_here[:4])} stands next to stages, but stage {stage.name} is experiment={stage.experiment}, which does not "
        "see it: put it into the overrides of each stage, or onto the command line.",
    )


def _flat(composed: Any) -> dict[str, Any]:
    return dict(leaves(OmegaConf.to_container(composed, resolve=False)))


def stage_overrides(outline: Outline, number: int, given: Sequence[str]) -> list[str]:
    """The overrides that make stage `number` of what the command line gives."""
    stage = outline.stages[number]
    experiment = [override for override in given if _key(override) == "experiment"]
    if stage.experiment is not None:
        experiment = [f"experiment={stage.experiment}"]
    mine = [override for override in given if _key(override) not in _OF_THE_WHOLE]
    if number:
        mine = [override for override in mine if _key(override) != _START]
    forced = [
        f"name={outline.composed.name}_{stage.name}",
        f"run_dir={outline.run_dir(stage)}",
        "stages=[]",
        "stage=null",
    ]
    if number:
        forced.append(f"{_START}={outline.run_dir(outline.stages[number - 1])}")
    if said(outline.composed.logging.wandb, "group") is None:
        forced.append(f"logging.wandb.group={outline.composed.name}")
    return [*experiment, *stage.overrides, *mine, *forced]


def of_run(overrides: list[str]) -> list[str]:
    """Overrides that name by run_dir a run of several stages name the stage that `stage=NAME` chooses, or the last that has begun.

    Raises ConfigError for a stage that there is not.
    """
    given = {_key(override): text_of(override) for override in overrides}
    folder = Path(given.get("run_dir", ""))
    if "run_dir" not in given or not (folder / STAGES).is_file():
        return overrides
    names = stage_names(folder)
    begun = [name for name in names if (folder / name / CONFIG).is_file()]
    asked = given.get("stage", begun[-1] if begun else None)
    if asked not in begun:
        raise ConfigError(
            f"stage is {asked}, but {folder} holds {', '.join(begun) or 'none that has begun'}: choose another, or train it first."
        )
    return [o for o in overrides if _key(o) not in ("run_dir", "stage")] + [f"run_dir={folder / asked}"]


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _keys(overrides: Sequence[str]) -> list[str]:
    return [_key(override) for override in overrides]
