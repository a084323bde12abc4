"""Where a model runs: engines behind one protocol."""

from __future__ import annotations

import importlib

from m4train.config import ENGINES, Config
from m4train.training.engines.base import Engine


def make_engine(config: Config) -> Engine:
    """The engine named by engine.name, whose class is loaded now; a precision left to the machine is decided."""
    from m4train.training.precision import resolve_precision

    resolve_precision(config)
    module, _, name = ENGINES[config.engine.name].partition(":")
    return getattr(importlib.import_module(module), name)(config)
