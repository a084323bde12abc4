"""The largest batch a run may meet, so that a device that is too small shows in the first minute."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from m4train.batch import PackedBatch, PackedImages, Segments


def worst_batch(batch: PackedBatch, tokens: int, frames: int) -> PackedBatch:
    """`batch` filled up to budgets of `tokens` and `frames` (images, for packed patches), every added token with a loss.

    The images added are those of the batch again, beyond `images.count`: they run through the vision tower and are then
    multiplied into nothing. A batch that reaches a budget already keeps what it has.
    """
    missing = max(0, tokens - batch.tokens)
    images = None if batch.images is None else _filled(batch.images, frames)
    if missing == 0:
        return replace(batch, images=images)
    start = batch.tokens
    ids = batch.input_ids[:1].expand(missing)
    positions = torch.arange(missing, dtype=torch.int64, device=batch.device)
    lengths = [*batch.segments.lengths, missing]
    count = missing - 1
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, ids]),
        position_ids=torch.cat([batch.position_ids, positions]),
        segments=Segments.of(lengths, batch.device),
        loss_positions=torch.cat([batch.loss_positions, positions[:-1] + start]),
        targets=torch.cat([batch.targets, ids[1:]]),
        target_weights=_longer(batch.target_weights, count),
        target_sources=_longer(batch.target_sources, count),
        images=images,
    )


def _longer(values: Tensor | None, count: int) -> Tensor | None:
    return None if values is None else torch.cat([values, values.new_ones(count) * (values[:1] if len(values) else 0)])


def _filled(images: PackedImages, frames: int) -> PackedImages:
    """Repeats the images until there are at least `frames`."""
    if images.patches is None:
        present = images.pixels.shape[0]
        times = max(1, -(-frames // present))
        pick = torch.arange(present * times, device=images.pixels.device)[: max(frames, present)] % present
        mask = None if images.patch_mask is None else images.patch_mask[pick]
        return replace(images, pixels=images.pixels[pick], patch_mask=mask)
    times = max(1, -(-frames // len(images.patches)))
    ids = images.patch_position_ids
    return replace(
        images,
        pixels=images.pixels.repeat(times, *[1] * (images.pixels.ndim - 1)),
        patches=Segments.of(images.patches.lengths * times, images.pixels.device),
        patch_position_ids=None if ids is None else ids.repeat(times),
    )
