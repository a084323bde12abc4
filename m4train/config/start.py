"""What a configuration says of the model next to model.pretrained, whose folder has all of it already.

The choices of `conf/model` that make a model from scratch give an architecture, settings of its processor and, in an
experiment, a tokenizer. If a run starts from a folder, these are not meant; what an experiment or the command line says
itself is, and `checks.py` refuses what cannot act.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from m4train.errors import ConfigError

NEUTRAL = "backbones"  # the choice of conf/model that says nothing of an architecture


def composed_start(compose: Callable[[list[str]], Any], overrides: Sequence[str], composed: Any) -> Any:
    """The composition of `overrides`, which is `composed`, without the architecture of a choice of `model` if it starts from a
    folder."""
    if composed.model.pretrained is None or not composed.model.architecture:
        return composed
    again = [f"model={NEUTRAL}", f"model.family={composed.model.family}"]
    if starts_from(overrides) is not None:
        again.append("model.tokenizer=null")  # that of an experiment which makes a model from scratch
    return compose([*again, *(override for override in overrides if not override.startswith("model="))])


def starts_from(overrides: Sequence[str]) -> str | None:
    """The folder that overrides set model.pretrained to; None if they do not."""
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    value = given.get("model.pretrained", "null")
    return None if value in ("null", "") else value


def forget_scratch(model: Any, starts: bool = False) -> None:
    """Takes out of a stored `model` group what an earlier version kept of a choice, and never read, next to pretrained.

    `starts`: a command starts from a folder instead of the model that the group describes.
    """
    if model.architecture and (starts or model.pretrained is not None):
        model.architecture, model.processor, model.tokenizer = {}, {}, None


# Two keys that say the same: the first is taken if it is not null.
_SAME = (("trainer.epochs", "trainer.max_steps"), ("schedule.warmup_fraction", "schedule.warmup_steps"))


def take_nearest(composed: Any, overrides: Sequence[str]) -> None:
    """Lets a length that the command line gives in steps count, whatever an experiment says in epochs or shares.

    Raises ConfigError if the command line gives both.
    """
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    for instead, steps in _SAME:
        if steps in given and given.get(instead, "null") != "null":
            raise ConfigError(f"{instead} and {steps} say the same in two ways: give one of them.")
        if steps in given:
            group, _, name = instead.partition(".")
            composed[group][name] = None
