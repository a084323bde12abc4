"""What data asks of a processor. Everything else about it stays unknown there."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from m4train.processing.pieces import EncodedImage, Piece

Self = TypeVar("Self", bound="SampleProcessor")


class SampleProcessor(Protocol):
    """From the items and images of a sample to token ids and frames.

    `image_token_id` is at the places whose embeddings image features replace (or, in Idefics, at those that begin to
    attend to an image); `eos_id` ends a document. A detail is a number from 1 (fewest frames) to `most_detail`.
    """

    tokenizer: Any
    chat_template: str

    @property
    def image_token_id(self) -> int: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    @property
    def most_detail(self) -> int: ...

    @property
    def fixed_size(self) -> bool:
        """Whether every image is resized to the same size."""
        ...

    def fingerprint(self) -> str:
        """Names everything that changes ids, their number, or what a frame is."""
        ...

    def encode_document(self, items: list[dict]) -> list[Piece]: ...

    def encode_messages(self, messages: list[dict]) -> list[Piece]: ...

    def encode_image(self, image: Image.Image, size: tuple[int, int] | None = None) -> EncodedImage:
        """Frames and ids of one image; `size` (width, height) of its file if it was decoded smaller."""
        ...

    def tokens_for(self, width: int, height: int) -> int:
        """How many ids an image of this size in pixels takes."""
        ...

    def frames_for(self, width: int, height: int) -> int:
        """How many frames it becomes."""
        ...

    def natural_detail(self, width: int, height: int) -> int:
        """The most detail for which an image of this size need not be enlarged."""
        ...

    def at_detail(self: Self, detail: int) -> Self:
        """This processor with at most `detail`."""
        ...

    def needed_size(self, width: int, height: int) -> tuple[int, int] | None:
        """The smallest size to decode an image in; None if it must be decoded whole."""
        ...

    def pixel_table(self) -> np.ndarray:
        """The value (3, 256) float32 of each uint8 level of each channel."""
        ...

    def decode(self, ids: Any, **options: Any) -> str: ...
