"""The data formats by name."""

from __future__ import annotations

from collections.abc import Callable

from m4train.config import SourceConfig
from m4train.data.sources.base import ShardFormat
from m4train.data.sources.fields import Reading
from m4train.data.sources.json_records import JsonRecords
from m4train.data.sources.parquet import ParquetRows
from m4train.data.sources.pictures import Pictures
from m4train.data.sources.tar import CanonicalTar
from m4train.data.sources.tar_formats import (
    LlavaOneVision,
    M4Conversations,
    M4Documents,
    Pairs,
)
from m4train.data.sources.web_tars import EnergonInterleaved, Mint1T, Mmc4
from m4train.errors import ConfigError

_KINDS: tuple[Callable[[Reading], ShardFormat], ...] = (
    CanonicalTar,
    M4Documents,
    M4Conversations,
    Pairs,
    EnergonInterleaved,
    Mint1T,
    Mmc4,
    LlavaOneVision,
    JsonRecords,
    ParquetRows,
)
FORMATS: dict[str, Callable[[Reading], ShardFormat]] = {kind.name: kind for kind in _KINDS}  # type: ignore[attr-defined]


def shard_format(config: SourceConfig, key: str = "data.sources.*") -> ShardFormat:
    """The format of the source called `key`. Raises ConfigError for an unknown name, and for options that mean nothing."""
    if config.format not in FORMATS:
        raise ConfigError(f"A source's format is {config.format!r}, but must be one of {', '.join(FORMATS)}.")
    reading = Reading.of(config, key)
    found = FORMATS[config.format](reading)
    reading.check_honoured(found.honours, config.format, key)
    found.image_range = tuple(config.image_range)
    settings = dict(found.settings)
    if reading.digest():
        settings["reading"] = reading.digest()
    if config.image_folder is not None:
        if not hasattr(found, "pictures"):
            raise ConfigError(
                f"image_folder is {config.image_folder!r}, but format {config.format} keeps its images in its shards."
            )
        found.pictures = Pictures(config.image_folder)
        settings["image_folder"] = config.image_folder
    found.settings = settings
    return found
