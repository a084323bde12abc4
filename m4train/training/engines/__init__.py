"""Where a model runs: engines behind one protocol."""

from __future__ import annotations

from m4train.config import ENGINES, Config
from m4train.errors import ConfigError
from m4train.training.engines.base import Engine


def make_engine(config: Config) -> Engine:
    """The engine named by engine.name. Raises ConfigError for an unknown name."""
    if config.engine.name == "single":
        from m4train.training.engines.single import SingleEngine

        return SingleEngine(config)
    if config.engine.name == "ddp":
        from m4train.training.engines.ddp import DDPEngine

        return DDPEngine(config)
    if config.engine.name == "fsdp2":
        from m4train.training.engines.fsdp import FSDPEngine

        return FSDPEngine(config)
    if config.engine.name in ("zero1", "zero2", "zero3"):
        from m4train.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    raise ConfigError(f"engine.name is {config.engine.name!r}, but must be one of {', '.join(ENGINES)}.")
