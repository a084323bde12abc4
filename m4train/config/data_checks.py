"""The checks of the data side of a configuration."""

from __future__ import annotations

import math
from typing import Any

from m4train.config import AugmentConfig, Config, DataConfig, SourceConfig
from m4train.config.require import at_least, one_of, require


def check_data(config: Config, named: bool = True) -> None:
    """The group `data`, its sources and their options; unless `named`, there may be none yet, or without a path."""
    data = config.data
    _check_streams(config)
    for key in ("sequence_length", "images_per_pack", "packing_pool", "prefetch_steps", "shuffle_window"):
        at_least(f"data.{key}", getattr(data, key), 1)
    for key in ("num_workers", "auto_index_limit"):
        at_least(f"data.{key}", getattr(data, key), 0)
    if data.epochs is not None:
        at_least("data.epochs", data.epochs, 1)
    for key in ("squared", "frame"):
        at_least(f"data.cost.{key}", getattr(data.cost, key), 0)
    _check_augment(data)
    require(
        data.cache_size > 0, f"data.cache_size is {data.cache_size} GiB: give more than 0, or set data.cache_dir=null."
    )
    one_of("data.mixture.by", data.mixture.by, ("samples", "tokens", "loss_tokens", "images"))
    require(
        data.mixture.by != "loss_tokens" or data.mixture.temperature is None,
        "data.mixture.temperature needs the sizes of sources, which are not known in loss_tokens: give weights, or set by=tokens.",
    )
    require(
        data.mixture.temperature is None or data.mixture.temperature > 0,
        f"data.mixture.temperature is {data.mixture.temperature}, but must be positive, or null to take weights as they are.",
    )
    one_of("data.long_documents", data.long_documents, ("split", "drop"))
    one_of("data.long_conversations", data.long_conversations, ("drop", "truncate"))
    require(
        0 <= data.max_dropped_fraction <= 1,
        f"data.max_dropped_fraction is {data.max_dropped_fraction}: give a share from 0 to 1.",
    )
    require(
        0 <= data.max_bad_fraction <= 1, f"data.max_bad_fraction is {data.max_bad_fraction}: give a share from 0 to 1."
    )
    _check_holdout(data)
    require(
        bool(data.sources) or not named,
        "data.sources is empty: choose a data=... or add data.sources.NAME.path=SHARDS.",
    )
    for group, sources in (("sources", data.sources), ("validation", data.validation)):
        for name, source in sources.items():
            _check_source(f"data.{group}.{name}", source, named, trains=group == "sources")


def _check_source(key: str, source: SourceConfig, named: bool, trains: bool) -> None:
    require(
        bool(source.path) or not named,
        f"{key}.path is empty: give the file or the shards of this source, such as own.json or data/train-{{000..099}}.tar.",
    )
    one_of(f"{key}.loss", source.loss, ("auto", "all", "last_turn"))
    require(
        source.loss_weight > 0,
        f"{key}.loss_weight is {source.loss_weight}, but must be above 0; remove the source to leave it out.",
    )
    require(
        trains or source.loss_weight == 1,
        f"{key}.loss_weight is {source.loss_weight}, but held-out losses are not weighted: remove it.",
    )
    require(
        trains or source.epochs is None,
        f"{key}.epochs is {source.epochs}, but held-out sources are read once: remove it.",
    )
    require(
        source.weight > 0,
        f"{key}.weight is {source.weight}, but must be above 0; remove the source to leave it out.",
    )
    _check_options(key, source)


def _check_holdout(data: DataConfig) -> None:
    require(0 <= data.holdout < 1, f"data.holdout is {data.holdout}: give a share from 0 to below 1, such as 0.02.")
    for name, source in data.sources.items():
        require(
            not source.held_out, f"data.sources.{name}.held_out is true, but sources train: set it in data.validation."
        )
        require(
            not (data.holdout and source.stream),
            f"data.holdout={data.holdout} needs an index, but data.sources.{name}.stream is true: turn one of them off.",
        )
    for name, source in data.validation.items():
        require(
            not source.held_out or data.holdout > 0,
            f"data.validation.{name}.held_out is true, but data.holdout is 0: set data.holdout, or remove it.",
        )


def _check_augment(data: DataConfig) -> None:
    at_least("data.augment.shift_pixels", data.augment.shift_pixels, 0)
    at_least("data.augment.rotate_degrees", data.augment.rotate_degrees, 0)
    for name, highest in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
        given = getattr(data.augment, name)
        require(
            (name == "crop_scale" and not given) or (len(given) == 2 and 0 < given[0] <= given[1] <= highest),
            f"data.augment.{name} is {list(given)}, but must be two numbers, the smaller first, such as "
            f"{[0.9, 1.0] if name == 'crop_scale' else [0.75, 1.33]}.",
        )
    require(
        bool(data.augment.crop_scale) or data.augment.crop_ratio == AugmentConfig().crop_ratio,
        f"data.augment.crop_ratio is {list(data.augment.crop_ratio)}, but crop_scale is empty: set that one too.",
    )
    scaled = [name for name, source in data.sources.items() if source.images.scaled_decode]
    require(
        not scaled or data.augment == AugmentConfig(),
        f"data.sources.{(scaled or [''])[0]}.images.scaled_decode is true, but data.augment changes pixels of whole "
        "images: turn one of them off.",
    )


def _check_streams(config: Config) -> None:
    """What needs an index does not go with streamed sources."""
    data = config.data
    for name, source in data.validation.items():
        require(not source.stream, f"data.validation.{name}.stream is true, but held-out sources need an index.")
    streamed = [name for name, source in data.sources.items() if source.stream]
    if not streamed:
        return
    key = f"data.sources.{streamed[0]}.stream"
    others = ", ".join(name for name in data.sources if name not in streamed)
    require(not others, f"{key} is true, but not that of {others}: stream all sources of a run, or none.")
    needed: dict[str, tuple[Any, Any]] = {
        "data.mixture.by": (data.mixture.by, "samples"),
        "data.mixture.temperature": (data.mixture.temperature, None),
        "data.mixture.schedule": (dict(data.mixture.schedule), {}),
        "data.long_documents": (data.long_documents, "drop"),
        "data.long_conversations": (data.long_conversations, "drop"),
        "data.epochs": (data.epochs, None),
        "data.cost.measured": (data.cost.measured or None, None),
        "trainer.batch_ramp.start": (config.trainer.batch_ramp.start, None),
    }
    for name, source in data.sources.items():
        needed[f"data.sources.{name}.epochs"] = (source.epochs, None)
        needed[f"data.sources.{name}.documents.end_marker"] = (source.documents.end_marker, None)
    for name, (value, only) in needed.items():
        shown = "null" if only is None else only
        require(
            value == only,
            f"{name} is {value}, which needs an index, but {key} is true: set {name}={shown}, or index the shards.",
        )


def _check_options(key: str, source: SourceConfig) -> None:
    """The options of one source, named `key`."""
    documents, talks, images = source.documents, source.conversations, source.images
    one_of(f"{key}.documents.ending_images", documents.ending_images, ("keep", "strip", "skip"))
    limits: dict[str, int | None] = {
        "epochs": source.epochs,
        "variants": source.variants,
        "documents.max_images": documents.max_images,
        "documents.max_images_in_a_row": documents.max_images_in_a_row,
        "images.max_tokens": images.max_tokens,
        "images.max_tokens_per_sample": images.max_tokens_per_sample,
    }
    for name, value in limits.items():
        require(
            value is None or value >= (0 if name == "documents.max_images" else 1),
            f"{key}.{name} is {value}, but must be at least 1; null sets no limit.",
        )
    require(documents.end_marker != "", f"{key}.documents.end_marker is empty: give the text, or null.")
    for name, share in (
        ("conversations.newline_probability", talks.newline_probability),
        ("images.upscale_probability", images.upscale_probability),
    ):
        require(0 <= share <= 1, f"{key}.{name} is {share}: give a probability from 0 to 1.")
    at_least(f"{key}.images.upscale_max", images.upscale_max, 1)
    require(
        images.upscale_max > 1 or images.upscale_probability == 1,
        f"{key}.images.upscale_probability is {images.upscale_probability}, but images.upscale_max is 1: raise that one.",
    )
    tiles = images.tiles
    require(
        not tiles or (min(tiles) >= 1 and all(math.isfinite(share) and share > 0 for share in tiles.values())),
        f"{key}.images.tiles is {dict(tiles)}, but must give numbers of tiles of at least 1 a share above 0, such as {{2: 0.7, 4: 0.3}}.",
    )
    ends = list(source.image_range)
    require(
        not ends or (len(ends) == 2 and ends[0] != ends[1] and all(math.isfinite(end) for end in ends)),
        f"{key}.image_range is {ends}, but must be the two values that are black and white, such as [0, 4095], or empty.",
    )
    random = talks.shuffle_turns or talks.newline_probability > 0 or images.upscale_max > 1 or len(tiles) > 1
    require(
        random or source.variants == SourceConfig().variants,
        f"{key}.variants is {source.variants}, but nothing of this source is random: leave it out.",
    )
