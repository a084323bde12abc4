"""The data formats by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from m4train.config import SourceConfig
from m4train.data.sources.base import ShardFormat
from m4train.data.sources.csv_records import CsvRecords
from m4train.data.sources.detect import detect
from m4train.data.sources.fields import Reading
from m4train.data.sources.json_records import JsonRecords
from m4train.data.sources.parquet import ParquetRows
from m4train.data.sources.picture_folder import PictureFolder
from m4train.data.sources.pictures import Pictures
from m4train.data.sources.tar import CanonicalTar
from m4train.data.sources.tar_formats import (
    LlavaOneVision,
    M4Conversations,
    M4Documents,
    Pairs,
)
from m4train.data.sources.web_tars import EnergonInterleaved, Mint1T, Mmc4
from m4train.data.storage.files import FileReader
from m4train.errors import ConfigError

_LOG = logging.getLogger(__name__)
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
    CsvRecords,
    ParquetRows,
    PictureFolder,
)
FORMATS: dict[str, Callable[[Reading], ShardFormat]] = {kind.name: kind for kind in _KINDS}  # type: ignore[attr-defined]


def format_of(config: SourceConfig, shards: Sequence[str], key: str, said: bool = False) -> SourceConfig:
    """The source called `key` with the format that its shards have, if it is to be found out; what it is taken for is said
    unless it was `said` before.

    Raises ConfigError if it cannot be told."""
    if config.format != "auto":
        return config
    found, why = detect(FileReader(), shards, key)
    if not said:
        _LOG.warning("%s: format auto takes it for %s: %s", key, found, why)
    return replace(config, format=found)


def shard_format(config: SourceConfig, key: str = "data.sources.*") -> ShardFormat:
    """The format of the source called `key`. Raises ConfigError for an unknown name, and for options that mean nothing."""
    if config.format == "auto":
        raise ConfigError(f"{key}.format is auto, but streamed shards cannot be looked at before: name their format.")
    if config.format not in FORMATS:
        raise ConfigError(f"A source's format is {config.format!r}, but must be auto or one of {', '.join(FORMATS)}.")
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
