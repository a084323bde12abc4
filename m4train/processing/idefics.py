"""The processor of Idefics: prompts are lists of texts and images, and every token attends to the latest image before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from m4train.processing.calls import ROW_OPTIONS, is_text, options_in_groups, refuse_other_inputs
from m4train.processing.chat import IDEFICS_TEMPLATE
from m4train.processing.doors import own_tokenizer
from m4train.processing.features import Features
from m4train.processing.idefics_images import IdeficsImageProcessor
from m4train.processing.image_processor import ImageProcessor
from m4train.processing.inputs import is_image, is_url
from m4train.processing.pieces import EncodedImage, Piece
from m4train.processing.processor import END_OF_UTTERANCE, FAKE, IMAGE, Processor
from m4train.processing.sample_encoding import Framing, encode_document
from m4train.processing.settings import known_alone
from m4train.processing.spans import Span, spans_around_images
from m4train.processing.tokenizer import Tokenizer

Prompt = Sequence[Any]  # texts and images in reading order


class IdeficsProcessor(Processor):
    """Text and images to the inputs of Idefics.

    `add_end_of_utterance_token` writes <end_of_utterance> between two texts of a prompt that follow each other; None does
    so if the tokenizer came with that token.
    """

    image_processor_class = IdeficsImageProcessor
    default_template: ClassVar[str] = IDEFICS_TEMPLATE
    image_processor: IdeficsImageProcessor

    def __init__(
        self,
        image_processor: IdeficsImageProcessor,
        tokenizer: Tokenizer,
        image_size: int = 224,
        add_end_of_utterance_token: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        tokenizer = own_tokenizer(tokenizer)
        trained_with_it = END_OF_UTTERANCE in tokenizer.added_tokens
        if add_end_of_utterance_token:
            tokenizer.add_special_tokens([END_OF_UTTERANCE])
        super().__init__(image_processor, tokenizer, chat_template)
        self.image_size = image_size
        self.add_end_of_utterance_token = add_end_of_utterance_token
        self._ends_utterances = trained_with_it if add_end_of_utterance_token is None else add_end_of_utterance_token

    @classmethod
    def settings_for(cls, architecture: Any) -> dict[str, int]:
        return {"image_size": architecture.vision_config.image_size}

    @classmethod
    def _own_settings(cls) -> tuple[str, ...]:
        return ("image_size", "add_end_of_utterance_token")

    @property
    def opening(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(FAKE)]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_attention_mask"]

    def _framing(self) -> Framing:
        return replace(super()._framing(), prefix=[i for i in [self.bos_id] if i is not None])

    def image_ids(self, width: int, height: int) -> np.ndarray:
        """The ids (n,) int64 that an image takes in the text, whatever its size."""
        return np.asarray([self.image_token_id, *self.opening], np.int64)

    def encode_image(self, image: Image.Image, size: tuple[int, int] | None = None) -> EncodedImage:
        """The frame (1, 3, S, S) and ids of an image. No feature goes into the text: tokens attend to it from their layers."""
        ids = self.image_ids(*image.size)
        return EncodedImage(np.stack(self.image_processor.frames(image, size)), ids, np.zeros(len(ids), bool))

    def encode_document(self, items: list[dict]) -> list[Piece]:
        """As for every processor, with the spaces around each text dropped, as the model was trained."""
        stripped = [{"text": item["text"].strip(" ")} if isinstance(item.get("text"), str) else item for item in items]
        return encode_document(self.tokenizer, stripped, self._framing())

    @options_in_groups
    def __call__(  # type: ignore[override]  # prompts instead of images and text
        self,
        prompts: Any = None,
        padding: Any = "longest",  # bool | str | None, or the second of images and text
        truncation: bool | str | None = None,
        max_length: int | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        add_eos_token: bool = False,
        add_end_of_utterance_token: bool | None = None,
        debug: bool = False,
        return_tensors: str | None = "pt",
        *,
        images: Any = None,
        text: Any = None,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> Features:
        """`input_ids`, `attention_mask`, `pixel_values` (B, N, 3, S, S) and `image_attention_mask` (B, T, N) of prompts.

        A prompt is a list of texts and images; images are Pillow images or URLs. `prompts` is one or several. `text` with
        `images` is the other form: if texts hold a placeholder <image> for each image they are like those of the other
        processors; else one image comes before each text, or a list of images after it. The two may be the first
        arguments, as later versions have it. Every prompt begins with bos, once, whatever `add_special_tokens` says.
        `transform` makes a tensor (3, S, S) of a Pillow image instead of the image processor, for training. `debug`
        prints the prompts as they are encoded. `options` are others of padding and truncation, and settings of the
        image processor; they may come in the dictionaries `text_kwargs` and `images_kwargs`. Raises ValueError for
        arguments that do not fit.
        """
        if not isinstance(padding, (bool, str, type(None))):  # the order of later versions: images, text
            images, text = (prompts, padding) if is_text(padding) else (padding, prompts)
            prompts, padding = None, "longest"
        if prompts is not None and text is None and images is None:
            text = prompts
        elif prompts is not None:
            images, text = (prompts, text) if images is None else (images, prompts)
        ends = self._ends_utterances if add_end_of_utterance_token is None else add_end_of_utterance_token
        strings, samples = self._strings(images, text, ends)
        strings = [string + (self.tokenizer.eos_token or "") * add_eos_token for string in strings]
        if debug:
            print("\n".join(repr(string) for string in strings))
        encoded = [self.tokenizer.encode(string, add_special_tokens=False) for string in strings]
        rows = [spans_around_images(ids, self.image_token_id) for ids in encoded]
        refuse_other_inputs(type(self).__name__, options)
        row_options = {"padding": padding, "truncation": truncation, "max_length": max_length}
        row_options |= {name: options.pop(name) for name in ROW_OPTIONS if name in options}
        options = known_alone(type(self).__name__, options, self.image_processor.setting_names())
        image_processor = self.image_processor.replace(**options)
        return self._assemble(rows, samples, image_processor, return_tensors, **row_options, transform=transform)

    def _assemble(
        self,
        rows: list[list[Span]],
        samples: list[list[Any]],
        image_processor: ImageProcessor,
        return_tensors: str | None,
        padding: bool | str | None = "longest",
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> Features:
        """Rows of spans and their images as model inputs; truncation keeps bos, and drops images whole."""
        ids, kept = self._truncated(rows, samples, self.tokenizer.limit(truncation, max_length))
        inputs = self.tokenizer.pad(ids, padding, max_length, pad_to_multiple_of, padding_side)
        count = max(1, *(len(sample) for sample in samples))
        inputs["pixel_values"] = self._pixels(kept, count, transform, image_processor)
        inputs["image_attention_mask"] = [self._image_attention(row, count) for row in inputs["input_ids"]]
        if not any(samples):
            inputs["image_attention_mask"] = [np.zeros((len(row), 1), bool) for row in inputs["input_ids"]]
        return inputs.convert(return_tensors)

    def _pixels(self, samples: list[list[Any]], count: int, transform: Any, processor: ImageProcessor) -> np.ndarray:
        """Values (B, count, 3, S, S) of the images of each sample, zeros for what is missing."""
        values = [
            np.asarray(processor.preprocess(images, transform=transform, return_tensors="np")) for images in samples
        ]
        shape = next((value.shape[1:] for value in values if len(value)), (3, *[self.image_processor.image_size] * 2))
        pixels = np.zeros((len(samples), count, *shape), np.float32)
        for row, value in enumerate(values):
            if len(value):
                pixels[row, : len(value)] = value
        return pixels

    def _expanded(self, text: str) -> str:
        """A text with placeholders as one string: tokens written around an image are not doubled, nor is bos."""
        text = text.replace(FAKE + IMAGE, IMAGE).replace(IMAGE + FAKE, IMAGE)
        run = re.compile(f"(?:{re.escape(IMAGE)})+")
        bos = self.tokenizer.bos_token or ""
        expanded = run.sub(lambda match: FAKE + match.group().replace(IMAGE, IMAGE + FAKE), text)
        return expanded if bos and expanded.startswith(bos) else bos + expanded

    def _strings(self, images: Any, text: Any, end_utterances: bool) -> tuple[list[str], list[list[Any]]]:
        """Prompts in either form as one string each, with the tokens of their images, and these images."""
        if (placed := _placed(images, text)) is not None:
            return [self._expanded(one) for one, _ in placed], [sample for _, sample in placed]
        prompts = _prompts(images, text)
        _refuse_placeholders(prompts)
        samples = [[item for item in prompt if not _is_text(item)] for prompt in prompts]
        return [self._string(prompt, end_utterances) for prompt in prompts], samples

    def _string(self, prompt: Prompt, end_utterances: bool) -> str:
        """A prompt as one string, which begins with bos as the model was trained."""
        written = self.tokenizer.bos_token or ""
        before = None
        for item in prompt:
            kind = "text" if _is_text(item) else "image"
            if kind == "image":
                written += (IMAGE + FAKE) if before == "image" else (FAKE + IMAGE + FAKE)
            else:
                written += (END_OF_UTTERANCE if end_utterances and before == "text" else "") + item.strip(" ")
            before = kind
        return written

    def _image_attention(self, ids: list[int], count: int) -> np.ndarray:
        """Which of `count` images each of T tokens attends to: (T, count) int64, at most one 1 in a row.

        A token attends to the latest image, itself included; after eos to none, until the next image.
        """
        row = np.asarray(ids, np.int64)
        places = np.arange(len(row))
        is_image = row == self.image_token_id
        latest_image = np.maximum.accumulate(np.where(is_image, places, -1))
        latest_end = np.maximum.accumulate(np.where(row == self.eos_id, places, -1))
        ended_before = np.concatenate([[-1], latest_end[:-1]]) if len(row) else latest_end
        image = np.where(ended_before > latest_image, -1, np.cumsum(is_image) - 1)
        return (image[:, None] == np.arange(count)).astype(np.int64)


def _is_text(item: Any) -> bool:
    return isinstance(item, str) and not is_url(item.strip(" "))


def _placed(images: Any, text: Any) -> list[tuple[str, list[Any]]] | None:
    """Texts with their images if each text holds as many placeholders as it has images; None if that is not so."""
    texts = [text] if isinstance(text, str) else text
    if images is None or not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        return None
    counts = [one.count(IMAGE) for one in texts]
    if is_image(images) or (any(counts) and all(is_image(image) for image in images)):
        flat = iter([images] if is_image(images) else images)
        samples = [[image for _, image in zip(range(count), flat)] for count in counts]
        left = list(flat)
    else:
        samples, left = [list(sample) if isinstance(sample, (list, tuple)) else [sample] for sample in images], []
    agree = len(samples) == len(texts) and [len(sample) for sample in samples] == counts and not left
    if any(counts) and not agree:
        raise ValueError(
            f"The texts hold {counts} placeholders {IMAGE} and have other numbers of images: make them equal."
        )
    return list(zip(texts, samples)) if agree else None


def _refuse_placeholders(prompts: list[Prompt]) -> None:
    """Raises ValueError if a text spells the placeholder: it would take the place of another image, or of none."""
    for number, prompt in enumerate(prompts):
        count = sum(item.count(IMAGE) for item in prompt if _is_text(item))
        if count:
            raise ValueError(
                f"The texts of prompt {number} hold {count} placeholders {IMAGE}, which stand for no image when images"
                " are items of the prompt: leave them out, or give one for each image, and the images in `images`."
            )


def _prompts(images: Any, text: Any) -> list[Prompt]:
    """The arguments of a call as a list of prompts. Raises ValueError if they do not fit."""
    if text is None:
        raise ValueError("Give the processor prompts, or text with images: a prompt is a list of texts and images.")
    if images is None:
        several = isinstance(text, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in text)
        return list(text) if several else [[text] if isinstance(text, str) else text]
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    texts = [text] if isinstance(text, str) else list(text)
    if len(texts) != len(images) or not all(isinstance(item, str) for item in texts):
        raise ValueError(
            f"There are {len(texts)} texts and {len(images)} images: give one image, or one list of images, for each text, "
            "and texts without images in them."
        )
    if isinstance(images[0], (list, tuple)):
        return [[one, *several] for several, one in zip(images, texts)]
    return [[image, one] for image, one in zip(images, texts)]
