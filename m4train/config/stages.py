"""Runs of several stages: what the configuration of each is, and where it lies.

A stage is a run like any other, in `run_dir/NAME`, that starts from the weights of the one before. Its configuration is
composed by itself: its experiment, its overrides, those of the command line, and what makes it a stage.
"""

from __future__ import annotations

import itertools
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
from m4train.run_files import CHECKPOINTS, CLAIM, CONFIG, EXPORT, REPORT, STAGES, STALLED, STOP, stage_names

Compose = Callable[[list[str]], Any]
_OF_THE_WHOLE = ("experiment", "name", "run_dir", "stage", "stages")  # what a stage has a value of its own for
_ANY_DATA = "data=own"  # each stage chooses its own
_START = "model.pretrained"
# What else lies in the folder of the whole, and must not be the folder of a stage.
_OF_A_RUN = (CONFIG, CHECKPOINTS, EXPORT, REPORT, STALLED, CLAIM, STAGES, STOP, "logs", "slurm", "wandb")


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
    except ConfigError as refused:
        if "data" in _keys(given):
            raise
        try:
            composed = compose([*given, _ANY_DATA])
        except ConfigError:
            if "stages" in _keys(given):
                raise
            raise refused from None
        if not composed.stages:
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
            re.fullmatch(r"[A-Za-z0-9_][\w.-]*", stage.name) is not None,
            f"stages.{number}.name is {stage.name!r}, but must be a name for a folder, of letters, digits, '_', '-' and '.'.",
        )
        require(
            stage.name not in _OF_A_RUN,
            f"stages.{number}.name is {stage.name!r}, which is what a file or folder of a run is called: choose another.",
        )
        require(names.count(stage.name) == 1, f"stages has {stage.name} twice: give each stage a name of its own.")
        forced = (*_OF_THE_WHOLE, _START) if number else _OF_THE_WHOLE
        own = [key for key in _keys(stage.overrides) if key in forced]
        require(
            not own,
            f"stages.{number}.overrides sets {', '.join(own)}, which follows from being stage {stage.name}: leave it out.",
        )
    resume = [text_of(override) for override in given if _key(override) == "resume"]
    require(
        not names or asked is not None or not resume or resume[-1] in ("auto", "never"),
        f"resume={resume[-1] if resume else ''} is a checkpoint of one run, but there are several stages ({', '.join(names)}): say with "
        "stage=NAME which one begins there, or put it into the overrides of that stage.",
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


def check_together(configs: Sequence[Config]) -> None:
    """Raises ConfigError for stages that cannot be trained one after another by the same processes."""
    for before, config in itertools.pairwise(configs):
        require(
            before.model.family == config.model.family,
            f"stage {config.stage} has model.family={config.model.family}, but starts from the weights of stage {before.stage}, of "
            f"{before.model.family}: train one family in all stages.",
        )
    processes = {config.name: config.launch.processes for config in configs}
    require(
        len(set(processes.values())) == 1,
        f"launch.processes differs between stages ({processes}), but all of them are trained by the same processes.",
    )


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
