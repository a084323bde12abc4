"""Tokenizers, chat templates, images, and one processor per model: from samples to token ids and frames, without torch."""

from m4train.processing.auto import AutoProcessor, AutoTokenizer
from m4train.processing.idefics import IdeficsProcessor
from m4train.processing.idefics2 import Idefics2Processor
from m4train.processing.idefics2_images import Idefics2ImageProcessor, Idefics2ImageProcessorFast
from m4train.processing.idefics3 import Idefics3Processor, SmolVLMProcessor
from m4train.processing.idefics3_images import Idefics3ImageProcessor, SmolVLMImageProcessor
from m4train.processing.idefics_images import IdeficsImageProcessor
from m4train.processing.pieces import EncodedImage, ImagePiece, Piece, TextPiece
from m4train.processing.tokenizer import Tokenizer

__all__ = [
    "AutoProcessor",
    "AutoTokenizer",
    "EncodedImage",
    "Idefics2ImageProcessor",
    "Idefics2ImageProcessorFast",
    "Idefics2Processor",
    "Idefics3ImageProcessor",
    "Idefics3Processor",
    "IdeficsImageProcessor",
    "IdeficsProcessor",
    "ImagePiece",
    "Piece",
    "SmolVLMImageProcessor",
    "SmolVLMProcessor",
    "TextPiece",
    "Tokenizer",
]
