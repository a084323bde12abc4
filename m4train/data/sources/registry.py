"""The data formats by name."""

from __future__ import annotations

from m4train.config import SourceConfig
from m4train.data.sources.base import ShardFormat
from m4train.data.sources.json_records import JsonRecords
from m4train.data.sources.parquet import ParquetRows
from m4train.data.sources.pictures import Pictures
from m4train.data.sources.tar import CanonicalTar
from m4train.data.sources.tar_layouts import (
    EnergonInterleaved,
    LlavaOneVision,
    M4Conversations,
    M4Documents,
    Mint1T,
    Mmc4,
    Pairs,
)
from m4train.errors import ConfigError

_KINDS: tuple[type[ShardFormat], ...] = (
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
FORMATS: dict[str, type[ShardFormat]] = {kind.name: kind for kind in _KINDS}


def shard_format(config: SourceConfig) -> ShardFormat:
    """The format of a source. Raises ConfigError for an unknown name."""
    if config.format not in FORMATS:
        raise ConfigError(f"A source's format is {config.format!r}, but must be one of {', '.join(FORMATS)}.")
    found = FORMATS[config.format]()
    found.image_range = tuple(config.image_range)
    if config.image_folder is not None:
        if not hasattr(found, "pictures"):
            raise ConfigError(
                f"image_folder is {config.image_folder!r}, but format {config.format} keeps its images in its shards."
            )
        found.pictures = Pictures(config.image_folder)
        found.settings = {"image_folder": found.pictures.folder}
    return found
