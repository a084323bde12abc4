"""The processor of Idefics3 and SmolVLM: an image becomes tiles marked by row and column, and a view of the whole."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from m4train.processing.chat import IDEFICS3_TEMPLATE
from m4train.processing.idefics3_images import Idefics3ImageProcessor, SmolVLMImageProcessor
from m4train.processing.processor import FAKE, IMAGE, Processor
from m4train.processing.tokenizer import Tokenizer

GLOBAL_IMAGE = "<global-img>"
MARKED_SIDE = 6  # rows and columns for which a vocabulary may hold <row_i_col_j> tokens


class Idefics3Processor(Processor):
    """Text and images to the inputs of Idefics3.

    `image_seq_len` is the number of features of a frame: (image size / patch size / scale factor) squared.
    """

    image_processor_class = Idefics3ImageProcessor
    default_template: ClassVar[str] = IDEFICS3_TEMPLATE
    image_processor: Idefics3ImageProcessor
    global_image_tag = global_image_token = GLOBAL_IMAGE

    def __init__(
        self,
        image_processor: Idefics3ImageProcessor,
        tokenizer: Tokenizer,
        image_seq_len: int = 169,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template)
        self.image_seq_len = image_seq_len
        self._grid_ids: dict[tuple[int, int, int], np.ndarray] = {}

    def structural_tokens(self) -> list[str]:
        return [*super().structural_tokens(), GLOBAL_IMAGE, *position_tokens()]

    @property
    def global_image_token_id(self) -> int | None:
        """None, or that of the unknown token, in a vocabulary that spells the tag in several tokens."""
        return self.tokenizer.convert_tokens_to_ids(GLOBAL_IMAGE)

    @classmethod
    def _own_settings(cls) -> tuple[str, ...]:
        return ("image_seq_len",)

    def image_string(self, rows: int, columns: int) -> str:
        """What an image of this grid is in the text; rows and columns are 0 for one frame."""
        features = IMAGE * self.image_seq_len
        whole = f"{FAKE}{GLOBAL_IMAGE}{features}{FAKE}"
        if rows == 0 and columns == 0:
            return whole
        lines = (
            "".join(f"{FAKE}<row_{row}_col_{column}>{features}" for column in range(1, columns + 1))
            for row in range(1, rows + 1)
        )
        return "\n".join(lines) + "\n\n" + whole

    def image_ids(self, width: int, height: int) -> np.ndarray:
        """The ids (n,) int64 that an image of this size takes in the text."""
        return self._ids_of_grid(*self.image_processor.grid(width, height))

    def _ids_of_grid(self, rows: int, columns: int) -> np.ndarray:
        key = (rows, columns, self.image_seq_len)
        if key not in self._grid_ids:
            text = self.image_string(rows, columns)
            ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int64)
            ids.flags.writeable = False  # shared by all images of this grid
            self._grid_ids[key] = ids
        return self._grid_ids[key]


class SmolVLMProcessor(Idefics3Processor):
    """The processor of SmolVLM on images: the same computation under the name its folders carry."""

    image_processor_class = SmolVLMImageProcessor


def position_tokens() -> list[str]:
    """The tokens <row_i_col_j> of the largest grid that Idefics3 was trained with, row by row."""
    sides = range(1, MARKED_SIDE + 1)
    return [f"<row_{row}_col_{column}>" for row in sides for column in sides]
