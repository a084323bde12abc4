"""How a model takes the images of a batch: whole frames, packed patches, or frames seen through cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from m4train.batch import CrossSegments, PackedImages, Segments
from m4train.positions import patch_position_ids
from m4train.processing.idefics2_images import cut_patches
from m4train.processing.protocol import SampleProcessor


@dataclass(frozen=True)
class Frames:
    """Square frames of one size, whose features replace tokens of the text (Idefics3, SmolVLM)."""

    def images(self, frames: Sequence[np.ndarray], count: int, table: np.ndarray) -> PackedImages:
        """Images of `frames`, each (3, S, S) uint8, of which the first `count` are used."""
        return PackedImages(torch.from_numpy(np.stack(frames)), count, torch.from_numpy(table))

    def cross(self, documents: Sequence[np.ndarray]) -> CrossSegments | None:
        """Which images the tokens of documents with these ids, each (tokens,), attend to; None if they do not."""
        return None


FRAMES = Frames()


@dataclass(frozen=True)
class Patches(Frames):
    """Patches of frames of any size, end to end (Idefics2).

    `size` is the side of a patch in pixels; `side` and `rounding` are those of the tower's table of positions, see
    `m4train.positions.patch_position_ids`.
    """

    size: int
    side: int
    rounding: str = "exact"

    def images(self, frames: Sequence[np.ndarray], count: int, table: np.ndarray) -> PackedImages:
        """As `Frames.images`, with frames (3, H, W). An image that nothing uses is cut to one patch."""
        frames = frames if count else [frames[0][:, : self.size, : self.size]]
        cut = [cut_patches(frame, self.size) for frame in frames]
        return PackedImages(
            torch.from_numpy(np.concatenate([patches for patches, _, _ in cut])),
            count,
            torch.from_numpy(table),
            patches=Segments.of([len(patches) for patches, _, _ in cut]),
            patch_position_ids=torch.cat(
                [patch_position_ids(rows, columns, self.side, self.rounding) for _, rows, columns in cut]
            ),
        )


@dataclass(frozen=True)
class CrossFrames(Frames):
    """Square frames that tokens attend to from within the layers (Idefics): each to the latest image of its document,
    the image's own token included, and after an eos to none until the next image."""

    image_token_id: int
    eos_id: int

    def cross(self, documents: Sequence[np.ndarray]) -> CrossSegments:
        """The latest image of each token, for the ids (tokens,) of every document."""
        lengths: list[int] = []
        seen: list[list[int]] = []
        first = 0
        for ids in documents:
            images = np.flatnonzero(ids == self.image_token_id)
            ends = np.flatnonzero(ids == self.eos_id) + 1
            borders = sorted({0, len(ids), *images.tolist(), *ends.tolist()})
            for begin, end in pairwise(borders):
                latest = int(np.searchsorted(images, begin, side="right")) - 1
                ended = latest >= 0 and bool(((ends > images[latest]) & (ends <= begin)).any())
                lengths.append(end - begin)
                seen.append([] if latest < 0 or ended else [first + latest])
            first += len(images)
        return CrossSegments.of(lengths, seen)


def image_layout(name: str, architecture: Any, processor: SampleProcessor) -> Frames:
    """The layout of this name (`Family.image_layout`) for a model's configuration and its processor."""
    if name == "patches":
        return Patches(architecture.vision_config.patch_size, architecture.vision_config.grid)
    if name == "cross":
        assert processor.eos_id is not None  # Idefics' tokenizers end documents
        return CrossFrames(processor.image_token_id, processor.eos_id)
    return FRAMES
