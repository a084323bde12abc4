"""Small processors for everybody's tests: byte-level tokenizer, image settings, chat template."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from m4train.processing.idefics import IdeficsProcessor
from m4train.processing.idefics2 import Idefics2Processor
from m4train.processing.idefics2_images import Idefics2ImageProcessor
from m4train.processing.idefics3 import Idefics3Processor, SmolVLMProcessor
from m4train.processing.idefics3_images import Idefics3ImageProcessor, SmolVLMImageProcessor
from m4train.processing.idefics_images import IdeficsImageProcessor
from m4train.processing.tokenizer import Tokenizer
from m4train.processing.tokenizer_training import train_bpe_tokenizer

TEXTS = (
    "In this image, we see the city of New York, and more specifically the Statue of Liberty.",
    "What can we see in this image? There are buildings, trees, lights, and water visible.",
    "User: which digit is this?\nAssistant: the digit is seven.\n\n0 1 2 3 4 5 6 7 8 9",
    "A document holds text and images in reading order; the model predicts each next token of the text.",
)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image of random pixels, in any mode of Pillow."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    return image.convert("RGB").convert(mode)


@lru_cache(maxsize=8)
def tokenizer_folder(vocab_size: int = 512) -> Path:
    """A folder with a trained byte-level BPE tokenizer, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="m4train-tokenizer-"))
    train_bpe_tokenizer(TEXTS * 4, vocab_size, folder)
    return folder


def tiny_idefics2_processor(
    folder: str | Path | None = None, image_seq_len: int = 4, split: bool = False, shortest: int = 28, longest: int = 56
) -> Idefics2Processor:
    """A processor whose images have sides from `shortest` to `longest`; saved in `folder` where one is given."""
    size = {"shortest_edge": shortest, "longest_edge": longest}
    image_processor = Idefics2ImageProcessor(size=size, do_image_splitting=split)
    processor = Idefics2Processor(image_processor, Tokenizer.from_pretrained(tokenizer_folder()), image_seq_len)
    if folder is not None:
        processor.save_pretrained(folder)
    return processor


def tiny_idefics_processor(folder: str | Path | None = None, image_size: int = 28) -> IdeficsProcessor:
    """A processor with frames of `image_size`; saved in `folder` where one is given."""
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=image_size), tokenizer, image_size=image_size)
    if folder is not None:
        processor.save_pretrained(folder)
    return processor


def tiny_idefics3_processor(
    folder: str | Path | None = None,
    image_size: int = 32,
    image_seq_len: int = 4,
    split: bool = False,
    tiles: int = 2,
) -> Idefics3Processor:
    """A processor with frames of `image_size` and `image_seq_len` features each; saved in `folder` where one is given.

    Without `split` every image is one frame; with it, its longest side is `tiles` frames long.
    """
    longest = image_size * (tiles if split else 1)
    image_processor = Idefics3ImageProcessor(
        do_image_splitting=split, size={"longest_edge": longest}, max_image_size={"longest_edge": image_size}
    )
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=image_seq_len)
    if folder is not None:
        processor.save_pretrained(folder)
    return processor


def tiny_smolvlm_processor(image_size: int = 32, image_seq_len: int = 4, tiles: int = 2) -> SmolVLMProcessor:
    """A processor with frames of `image_size`, whose images' longest side is `tiles` frames long."""
    image_processor = SmolVLMImageProcessor(
        size={"longest_edge": image_size * tiles}, max_image_size={"longest_edge": image_size}
    )
    return SmolVLMProcessor(image_processor, Tokenizer.from_pretrained(tokenizer_folder()), image_seq_len=image_seq_len)
