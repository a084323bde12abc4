"""The data formats by name."""

from __future__ import annotations

from m4train.config import SourceConfig
from m4train.data.sources.base import ShardFormat
from m4train.data.sources.tar import CanonicalTar
from m4train.errors import ConfigError

FORMATS = {layout.name: layout for layout in (CanonicalTar,)}


def shard_format(config: SourceConfig) -> ShardFormat:
    """The format of a source. Raises ConfigError for a name that is none."""
    if config.format not in FORMATS:
        raise ConfigError(f"A source's format is {config.format!r}, but must be one of {', '.join(FORMATS)}.")
    return FORMATS[config.format]()
