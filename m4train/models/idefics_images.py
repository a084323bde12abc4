"""The padded image arguments of Idefics, turned into features and the segments of tokens that see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4train.batch import CrossSegments
from m4train.errors import DataError
from m4train.models.contexts import CrossContext
from m4train.models.doors import PaddedInputs
from m4train.models.padded import PaddedTokens, real_images
from m4train.models.prefixes import distinct

_SOURCES = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")


def padded_images(model: Any, inputs: PaddedInputs) -> tuple[Tensor | None, CrossContext | None, Tensor | None]:
    """Features (images * n, Hv), who sees them, and the features as (B, N, n, Hv).

    Features are None if those of the cache are used; all three if the text has no images.

    Raises:
        DataError: more than one source of images, or a mask that does not fit.
    """
    given = [name for name in _SOURCES if inputs.images.get(name) is not None]
    mask = inputs.images.get("image_attention_mask")
    if len(given) > 1:
        raise DataError(f"{' and '.join(given)} are given: pass one of them")
    cache = inputs.cache
    if not given:
        if mask is None or cache is None or cache.images is None:
            return None, None, None
        per_image = cache.cross[0][0].shape[0] // (int(cache.images.max()) + 1)
        return None, CrossContext(_cross_segments(mask, inputs.tokens, cache.images), per_image, cache), None
    if mask is None:
        raise DataError(f"{given[0]} is given without image_attention_mask (B, T, N): say which token sees which image")
    images = inputs.images[given[0]]
    if mask.shape[2] != images.shape[1]:
        raise DataError(
            f"image_attention_mask has shape {tuple(mask.shape)}, but {given[0]} holds {images.shape[1]} images per sample: "
            "its last axis must count them"
        )
    features, numbers = _features(model, given[0], inputs.images, mask)
    if cache is not None:
        cache.images = numbers
    per_image = features.shape[0] // (int(numbers.max()) + 1)
    cross = CrossContext(_cross_segments(mask, inputs.tokens, numbers), per_image, cache)
    by_image = torch.cat((features, features.new_zeros(per_image, features.shape[1]))).unflatten(0, (-1, per_image))
    return features, cross, by_image[numbers]  # -1 is the last: zeros


def _features(model: Any, source: str, images: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the images that are used, and the number (B, N) of each among them, -1 if it is not."""
    values = images[source]
    if source == "pixel_values":
        used = real_images(values) | mask.bool().any(1)
        if not used.any():
            used[0, 0] = True  # the tower runs on every rank
        numbers = (used.flatten().cumsum(0) - 1).view(used.shape).masked_fill(~used, -1)
        frames = values[used].to(model.dtype)
        interpolate = bool(images.get("interpolate_pos_encoding"))
        if torch.is_grad_enabled():
            return model.image_features(frames, interpolate), numbers
        first, which = distinct(frames)  # of several questions about one image it passes the tower once
        return model.image_features(frames[first], interpolate), torch.where(used, which[numbers], -1)
    numbers = torch.arange(values.shape[0] * values.shape[1], device=values.device).view(values.shape[:2])
    features = values.flatten(0, 2).to(model.dtype)
    if source == "perceiver_embeddings":
        if not model.config.use_resampler:
            raise DataError(
                "perceiver_embeddings are given, but this model has no resampler: pass image_encoder_embeddings"
            )
        return features, numbers
    return (model.resample(features, numbers.numel()) if model.config.use_resampler else features), numbers


def _cross_segments(mask: Tensor, tokens: PaddedTokens, numbers: Tensor) -> CrossSegments:
    """Segments of consecutive tokens of one sample that see the same images, from the mask (B, T, N)."""
    visible = tokens.flatten(mask[:, mask.shape[1] - tokens.shape[1] :].long())
    seen, lengths = torch.unique_consecutive(
        torch.cat((tokens.rows[:, None], visible), dim=1), dim=0, return_counts=True
    )
    places = numbers.tolist()
    images = [[places[row][i] for i, sees in enumerate(sight) if sees] for row, *sight in seen.tolist()]
    return CrossSegments.of(lengths.tolist(), images).to(mask.device)
