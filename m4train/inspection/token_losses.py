"""The loss of every document and token of a step, by the weights of a checkpoint: what gives a spike its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import PlannedPack
from m4train.inspection.preview import PackView, Span
from m4train.processing.protocol import SampleProcessor
from m4train.run_files import CHECKPOINTS
from m4train.training.checkpoints.files import checkpoints_in


def nearest_checkpoint(run_dir: Path, step: int) -> Path | None:
    """The last checkpoint before `step`, whose weights are nearest to those that made it; the first one, if all are later."""
    found = checkpoints_in(run_dir / CHECKPOINTS)
    before = [folder for number, folder in found if number < step]
    return before[-1] if before else found[0][1] if found else None


@torch.no_grad()
def token_losses(
    model: Any, collator: Collator, pack: PlannedPack, step: int, device: torch.device
) -> list[np.ndarray]:
    """For each document of a pack that is used, the cross-entropy of its loss tokens in order (L,); `model` evaluates."""
    batch, _ = collator.batch([pack], step)
    losses = model(batch.to(device)).token_losses.float().cpu().numpy()
    starts = np.cumsum([0, *batch.segments.lengths])
    places = np.searchsorted(batch.loss_positions.numpy(), starts)
    return [losses[first:last] for first, last in pairwise(places.tolist())]


def scored_pack(pack: PackView, losses: Sequence[np.ndarray], processor: SampleProcessor) -> PackView:
    """The pack with the losses of its documents, as `token_losses` gives them, at their tokens."""
    left, segments = iter(losses), []
    for segment in pack.segments:
        own = None if segment.problem else next(left)
        if own is None or not len(own):
            segments.append(segment)
            continue
        values = iter(own.tolist())
        spans = [_scored(span, values, processor) if span.ids else span for span in segment.spans]
        segments.append(replace(segment, spans=spans, loss=float(own.mean())))
    return replace(pack, segments=segments)


def _scored(span: Span, values: Any, processor: SampleProcessor) -> Span:
    """The span with the text that each of its tokens adds, and its loss."""
    texts = [processor.decode(np.array(span.ids[:count], np.int64)) for count in range(len(span.ids) + 1)]
    added = [after[len(before) :] for before, after in pairwise(texts)]
    return replace(span, scored=tuple((text, next(values)) for text in added))
