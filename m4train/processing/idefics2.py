"""The processor of Idefics2: an image is as many tokens as the resampler gives, between two tokens that neighbours share."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from m4train.processing.chat import IDEFICS2_TEMPLATE
from m4train.processing.idefics2_images import Idefics2ImageProcessor
from m4train.processing.images import upright
from m4train.processing.inputs import read_image
from m4train.processing.processor import FAKE, IMAGE, Processor
from m4train.processing.sample_encoding import Framing
from m4train.processing.spans import Span
from m4train.processing.tokenizer import Tokenizer


class Idefics2Processor(Processor):
    """Text and images to the inputs of Idefics2.

    `image_seq_len` is the number of features of a frame (latents of the resampler); a split image is five frames.
    `space_after_image` puts a space between an image and a word glued to it, as transformers 5.x does; 4.x and the
    training of the published models do not. A folder that 5.x wrote is read with it, another without.
    """

    image_processor_class = Idefics2ImageProcessor
    default_template: ClassVar[str] = IDEFICS2_TEMPLATE
    image_processor: Idefics2ImageProcessor

    def __init__(
        self,
        image_processor: Idefics2ImageProcessor,
        tokenizer: Tokenizer,
        image_seq_len: int = 64,
        chat_template: str | None = None,
        space_after_image: bool = False,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template)
        self.image_seq_len = image_seq_len
        self.space_after_image = space_after_image

    @classmethod
    def _own_settings(cls) -> tuple[str, ...]:
        return ("image_seq_len", "space_after_image")

    @property
    def opening(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(FAKE)]

    def image_string(self) -> str:
        """What an image is in the text."""
        frames = 5 if self.image_processor.do_image_splitting else 1
        return FAKE + (IMAGE * self.image_seq_len + FAKE) * frames

    def image_ids(self, width: int, height: int) -> np.ndarray:
        """The ids (n,) int64 that an image of this size takes in the text."""
        frame = [self.image_token_id] * self.image_seq_len + self.opening
        return np.asarray(frame * len(self.image_processor.frame_sizes(width, height)), np.int64)

    def read(self, image: Any) -> Image.Image:
        if self.image_processor.upstream_reading and isinstance(image, Image.Image):
            return upright(image).convert("RGB")
        return read_image(image, self.image_processor.upstream_reading)

    def _framing(self) -> Framing:
        return replace(super()._framing(), space_after_image=self.space_after_image)

    def _spans(self, text: str, images: list[Image.Image], add_special_tokens: bool) -> list[Span]:
        """Tokens that callers wrote around an image are the ones that the image brings, and are not doubled."""
        text = text.replace(FAKE + FAKE, FAKE).replace(FAKE + IMAGE, IMAGE).replace(IMAGE + FAKE, IMAGE)
        if self.space_after_image:
            text = _GLUED.sub(r"\1 ", text)
        return super()._spans(text, images, add_special_tokens)


_GLUED = re.compile(rf"({re.escape(IMAGE)}|{re.escape(FAKE)})(?=[^\s<])")
