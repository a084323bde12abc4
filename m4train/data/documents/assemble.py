"""Documents laid end to end: the last step from samples to a PackedBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from m4train.batch import DocumentRecord, PackedBatch, PackedImages, Segments
from m4train.data.documents.image_layout import Frames
from m4train.data.documents.rendering import Rendered
from m4train.processing.protocol import SampleProcessor


@dataclass(frozen=True)
class Document:
    """One segment, ready to be laid into a batch."""

    record: DocumentRecord
    source: int
    rendered: Rendered
    trained: np.ndarray  # (T,) bool


class Assembler:
    """Lays documents into batches, for one processor, set of sources and layout of images."""

    def __init__(self, processor: SampleProcessor, source_names: Sequence[str], layout: Frames) -> None:
        self._layout = layout
        self._processor = processor
        self._source_names = tuple(source_names)

    @cached_property
    def _spare_frame(self) -> np.ndarray:
        """(3, H, W): what the vision modules run on if a batch has no image."""
        return self._processor.encode_image(Image.new("RGB", (32, 32), (127, 127, 127))).frames[0]

    def batch(self, documents: Sequence[Document], data_hash: int, plan_hash: int, capacity: int) -> PackedBatch:
        """The documents in order; if there are none, one token that predicts nothing."""
        lengths = [len(document.rendered.ids) for document in documents] or [1]
        ids = [document.rendered.ids for document in documents] or [np.array([self._processor.eos_id], np.int64)]
        masks = [document.rendered.feature_mask for document in documents] or [np.zeros(1, bool)]
        trained = np.concatenate([document.trained for document in documents] or [np.zeros(1, bool)])
        of_source = np.repeat([document.source for document in documents] or [0], lengths)
        input_ids = np.concatenate(ids)
        targets = np.flatnonzero(trained)  # never 0: the first token of a document is not trained on
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
            segments=Segments.of(lengths),
            loss_positions=torch.from_numpy(targets - 1),
            targets=torch.from_numpy(input_ids[targets]),
            target_weights=_target_weights(documents, targets),
            images=self._images(documents),
            image_positions=torch.from_numpy(np.flatnonzero(np.concatenate(masks))),
            target_sources=torch.from_numpy(of_source[targets].astype(np.int64)),
            source_names=self._source_names,
            cross=self._layout.cross(ids),
            documents=tuple(document.record for document in documents),
            data_hash=data_hash,
            plan_hash=plan_hash,
            capacity=capacity,
        )

    def _images(self, documents: Sequence[Document]) -> PackedImages:
        frames = [frame for document in documents for frames in document.rendered.frames for frame in frames]
        return self._layout.images(frames or [self._spare_frame], len(frames), self._processor.pixel_table())


def _target_weights(documents: Sequence[Document], targets: np.ndarray) -> torch.Tensor | None:
    """(L,) float32, how much each target is learned; None if all are 1."""
    if all(document.rendered.weights is None for document in documents):
        return None
    given = [(document.rendered.weights, len(document.rendered.ids)) for document in documents]
    weights = np.concatenate([np.ones(length, np.float32) if each is None else each for each, length in given])[targets]
    return None if (weights == 1).all() else torch.from_numpy(weights)
