"""Learning-rate schedules: the factor on the peak rate is a function of the step alone, with no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

from m4train.config import ScheduleConfig
from m4train.errors import ConfigError


def _constant(progress: float, final: float) -> float:
    return 1.0


def _linear(progress: float, final: float) -> float:
    return 1.0 - (1.0 - final) * progress


def _cosine(progress: float, final: float) -> float:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, 2017, equation 5, without restarts)."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _decay_only(progress: float, final: float) -> float:
    """The decay of WSD (Hu et al., 2024): 1 - sqrt (Hagele et al., 2024), which ends lower than a straight line."""
    return final + (1.0 - final) * (1.0 - math.sqrt(progress))


_SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _decay_only,
}


def rate_factor(config: ScheduleConfig, max_steps: int, step: int) -> float:
    """The factor on every peak learning rate at update `step`, counted from 1 to `max_steps`.

    Warmup rises linearly and reaches 1 at `warmup_steps`; the shape then runs from there to `max_steps`, or, for
    wsd, over the last `decay_steps`.
    Raises ConfigError for an unknown shape.
    """
    if config.name not in _SHAPES:
        raise ConfigError(f"schedule.name is {config.name!r}, but must be one of {', '.join(_SHAPES)}.")
    if step < config.warmup_steps:
        return step / config.warmup_steps
    start = max_steps - config.decay_steps if config.name == "wsd" else config.warmup_steps
    progress = (step - start) / max(1, max_steps - start)
    return _SHAPES[config.name](min(1.0, max(0.0, progress)), config.final_fraction)
