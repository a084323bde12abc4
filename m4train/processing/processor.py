"""What the processors share: text with image placeholders to model inputs, and samples to pieces."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from m4train.hub import HUB_OPTIONS, PROCESSOR_FILES, WITHOUT_MEANING, model_folder, refuse_upload
from m4train.processing.calls import (
    ROW_OPTIONS,
    conversations_of,
    ended_in_last_message,
    images_of,
    images_per_text,
    is_text,
    options_in_groups,
    refuse_other_inputs,
    refuse_to_continue,
)
from m4train.processing.chat import ChatTemplate
from m4train.processing.detail import Detail
from m4train.processing.doors import END_OF_UTTERANCE, FAKE, IMAGE, ProcessorDoors, own_tokenizer
from m4train.processing.features import Features
from m4train.processing.files import ProcessorFiles, read_processor_files, write_processor_files
from m4train.processing.image_processor import ImageProcessor
from m4train.processing.inputs import nest_images, read_image
from m4train.processing.pieces import EncodedImage, ImagePiece, Piece, TextPiece
from m4train.processing.sample_encoding import Framing, encode_document, encode_messages
from m4train.processing.settings import known_alone, no_setting, warn_of_unused
from m4train.processing.spans import Span, truncate
from m4train.processing.tokenizer import SETTINGS, Place, Tokenizer

Self = TypeVar("Self", bound="Processor")


class Processor(Detail, ProcessorDoors):
    """Base of the processors: a tokenizer, an image processor and a chat template that agree on the image tokens."""

    image_processor_class: ClassVar[type[ImageProcessor]]
    default_template: ClassVar[str]

    def __init__(self, image_processor: ImageProcessor, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer = own_tokenizer(tokenizer)
        self._other_settings: dict[str, Any] = {}  # of processor_config.json, kept for whoever knows them
        self.named_templates = dict(tokenizer.named_templates)
        self.chat_template = tokenizer.chat_template or self.default_template
        if chat_template is not None:
            self.chat_template = chat_template
        # A template that closes turns otherwise needs no other token, for which the model may have no row.
        tokenizer.add_special_tokens([FAKE, IMAGE, *[END_OF_UTTERANCE] * (END_OF_UTTERANCE in self.chat_template)])
        tokenizer.reserve(self.structural_tokens())

    def structural_tokens(self) -> list[str]:
        """Tokens that only the processor may write: text that spells one stays text."""
        return [FAKE, IMAGE, END_OF_UTTERANCE]

    @property
    def opening(self) -> list[int]:
        """Ids before an image that does not directly follow another one; none for most processors."""
        return []

    # Files

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | Path,
        tokenizer_folder: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """Reads a folder of any form, or a hub model; its tokenizer, if one is named, from another folder.

        `settings` override those of this processor ("chat_template" among them), its image processor and its tokenizer;
        those given as None stay. An `image_processor` or `tokenizer` among them takes the place of the folder's. HUB_OPTIONS (revision, cache_dir, token ...) are those of a hub model. Raises ConfigError if a file is missing or unreadable, or the hub out of reach, and
        TypeError for a setting that none of the three has.
        """
        hub = {option: settings.pop(option) for option in HUB_OPTIONS if option in settings}
        settings = {name: value for name, value in settings.items() if name not in WITHOUT_MEANING}
        made = {part: settings.pop(part, None) for part in ("image_processor", "tokenizer")}
        own, of_tokenizer, of_images = cls._sorted(settings)
        folder = model_folder(pretrained_model_name_or_path, PROCESSOR_FILES, **hub)
        files = read_processor_files(folder)
        stated = {key: value for key, value in files.processor.items() if key in cls._own_settings()}
        processor = cls(
            (made["image_processor"] or cls.image_processor_class.from_dict(files.image_processor)).replace(
                **of_images
            ),
            made["tokenizer"] or Tokenizer.from_pretrained(tokenizer_folder or folder, **of_tokenizer),
            chat_template=of_tokenizer.get("chat_template") or files.chat_template,
            **{key: value for key, value in (stated | own).items() if value is not None},
        )
        processor.named_templates = {**processor.named_templates, **files.named_templates}
        processor._other_settings = {k: v for k, v in files.processor.items() if k not in stated}
        warn_of_unused(cls.__name__, processor._other_settings)
        return processor

    @classmethod
    def from_settings(cls: type[Self], tokenizer_folder: str | Path, settings: dict[str, Any]) -> Self:
        """A new processor of a tokenizer, with any of the settings that `from_pretrained` takes."""
        own, of_tokenizer, of_images = cls._sorted(settings)
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder, **of_tokenizer)
        template = of_tokenizer.get("chat_template")
        return cls(cls.image_processor_class(**of_images), tokenizer, chat_template=template, **own)

    @classmethod
    def _sorted(cls, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The settings that are given: of this processor, its tokenizer, and its image processor. Raises TypeError."""
        names = [cls._own_settings(), SETTINGS, cls.image_processor_class.setting_names()]
        for name in settings:
            if not any(name in some for some in names):
                raise no_setting(cls.__name__, name, [known for some in names for known in some])
        given = {key: value for key, value in settings.items() if value is not None}
        own, of_tokenizer, of_images = ({key: given[key] for key in given if key in some} for some in names)
        return own, of_tokenizer, of_images

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> list[str]:
        """Writes tokenizer, image settings, processor settings and chat template, as transformers 4.46 to 5.x reads them.

        Returns the files.
        """
        refuse_upload(push_to_hub)
        folder, settings = Path(save_directory), self._stated_settings()
        image = self.image_processor.to_dict() | {"processor_class": type(self).__name__}
        self.tokenizer.chat_template, self.tokenizer.named_templates = self.chat_template, self.named_templates
        self.tokenizer.config["processor_class"] = type(self).__name__
        self.tokenizer.save_pretrained(folder)
        files = ProcessorFiles(image, settings, self.chat_template, self.named_templates)
        return [str(path) for path in write_processor_files(folder, files)]

    def _stated_settings(self) -> dict[str, Any]:
        """What processor_config.json holds."""
        settings = {name: value for name in self._own_settings() if (value := getattr(self, name)) not in (None, False)}
        return self._other_settings | settings | {"processor_class": type(self).__name__}

    @classmethod
    def settings_for(cls, architecture: Any) -> dict[str, int]:
        """The settings that follow from a model's configuration, for a processor made with a new model."""
        return {"image_seq_len": architecture.tokens_per_image}

    @classmethod
    def _own_settings(cls) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        """A digest of everything that changes ids, their number, or what a frame is: tokenizer, template, settings."""
        state = {
            "class": type(self).__name__,
            "tokenizer": json.loads(self.tokenizer.backend.to_str()),
            "special_tokens": self.tokenizer.special_tokens_map,
            "template": self.chat_template,
            "geometry": self.image_processor.geometry(),
            "settings": {name: getattr(self, name) for name in self._own_settings()},
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()

    # Samples, as training reads them

    def encode_document(self, items: list[dict]) -> list[Piece]:
        """Pieces of a document: items {"text": ...} and {"image": ...} in reading order. Raises BadSample."""
        return encode_document(self.tokenizer, items, self._framing())

    def encode_messages(self, messages: list[dict]) -> list[Piece]:
        """Pieces of a conversation, as the chat template renders it. Raises BadSample, or ConfigError for the template."""
        return encode_messages(self.tokenizer, self._chat(), messages, self._framing())

    def encode_image(self, image: Image.Image, size: tuple[int, int] | None = None) -> EncodedImage:
        """Frames and ids of one image, without the ids that open neighbouring images (see `opening`).

        `size` is the (width, height) of its file if the image was decoded smaller, see `needed_size`.
        """
        ids = self.image_ids(*(size or image.size))
        return EncodedImage(self.image_processor.frames(image, size), ids, ids == self.image_token_id)

    def tokens_for(self, width: int, height: int) -> int:
        """How many ids an image of this size takes in the text."""
        return len(self.image_ids(width, height))

    def frames_for(self, width: int, height: int) -> int:
        """How many frames an image of this size becomes."""
        return len(self.image_processor.frame_sizes(width, height))

    def image_ids(self, width: int, height: int) -> np.ndarray:
        """The ids (n,) int64 that an image of this size takes in the text."""
        raise NotImplementedError

    def pixel_table(self) -> np.ndarray:
        """The value (3, 256) float32 of each uint8 level of each channel."""
        return self.image_processor.pixel_table()

    # Text and images, as inference gives them

    @options_in_groups
    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        audio: None = None,
        videos: None = None,
        *,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Features:
        """`input_ids`, `attention_mask`, `pixel_values` and `pixel_attention_mask` of texts with <image> placeholders.

        `images` is one image, a flat list in the order of the placeholders, or a list per text. `options` are those of
        padding and truncation (see `_assemble`), and settings of the image processor or of this processor for this
        call; they may come in the dictionaries `text_kwargs` and `images_kwargs`. A text that begins with bos gets no
        second one. Raises ValueError if a text holds more or fewer placeholders than it has images.
        """
        refuse_other_inputs(type(self).__name__, options | {"audio": audio, "videos": videos})
        options.pop("is_split_into_words", None)
        if text is not None and not is_text(text):
            if not is_text(images):
                raise ValueError(
                    f"text={str(text)[:80]!r} is not a text: give a string, or a list with a string per sample."
                )
            images, text = text, images  # the order of older versions
        row_options = {name: options.pop(name) for name in ROW_OPTIONS if name in options}
        processor = self._with(options)
        if text is None:
            if images is None:
                raise ValueError("Give the processor text, images, or both.")
            return processor.image_processor(images, return_tensors=return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        given = images_per_text(texts, images, IMAGE)
        samples = [[processor.read(image) for image in sample] for sample in given]
        rows = [processor._spans(one, sample, add_special_tokens) for one, sample in zip(texts, samples)]
        image_processor = processor.image_processor.for_values_of(given)
        return processor._assemble(rows, samples, image_processor, return_tensors, **row_options)

    def _assemble(
        self,
        rows: list[list[Span]],
        samples: list[list[Image.Image]],
        image_processor: ImageProcessor,
        return_tensors: str | None,
        padding: bool | str | None = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
    ) -> Features:
        """Rows of spans and their images as model inputs.

        `padding` is True or "longest", "max_length", or False; `padding_side` "left" or "right" overrides the tokenizer's.
        With `truncation` rows end (or begin) when `max_length` ids are full: an image is never cut, but dropped with all
        that comes after it.
        """
        ids, kept = self._truncated(rows, samples, self.tokenizer.limit(truncation, max_length))
        features = self.tokenizer.pad(ids, padding, max_length, pad_to_multiple_of, padding_side)
        features = features.convert(return_tensors)
        if any(kept):
            features |= image_processor.features(kept, return_tensors)
        return features

    def _truncated(
        self, rows: list[list[Span]], samples: list[list[Any]], limit: int | None
    ) -> tuple[list[list[int]], list[list[Any]]]:
        """Rows of at most `limit` ids, and the images whose places are left in each."""
        side = self.tokenizer.truncation_side
        ids, kept = [], []
        for row, sample in zip(rows, samples):
            spans = truncate(row, limit, side, self.bos_id, self.opening)
            ids.append([i for span, _ in spans for i in span])
            left = sum(is_image for _, is_image in spans)
            kept.append(sample[:left] if side == "right" else sample[len(sample) - left :])
        return ids, kept

    def read(self, image: Any) -> Image.Image:
        """An image in any accepted form, as a Pillow image."""
        return read_image(image, self.image_processor.upstream_reading)

    @options_in_groups
    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        images: Any = None,
        return_tensors: str | None = None,
        continue_final_message: bool = False,
        **options: Any,
    ) -> Any:
        """The conversation (or each of several) as a string; with `tokenize`, its ids, or all model inputs if `return_dict`.

        Tokens are made of what the messages say as plain text, as in training: special tokens are those that the template
        writes. Images are the "image", "url", "path", "base64" or "image_url" of content items, or
        `images`, a list for each conversation. `options` that the template reads are its variables; the others are
        those of a call of the processor. With `continue_final_message` the string ends where the last message ends, for
        the model to go on with; `chat_template` may name one of `named_templates`. Raises ValueError for what does not go
        together.
        """
        refuse_to_continue(continue_final_message, tokenize, add_generation_prompt)
        template = self._chat(chat_template)
        variables = {name: options.pop(name) for name in list(options) if name in template.variables}
        conversations, several = conversations_of(conversation)
        if not tokenize:
            texts = [template.render(template.prepare(c), add_generation_prompt, **variables) for c in conversations]
            if continue_final_message:
                texts = [ended_in_last_message(text, c) for text, c in zip(texts, conversations)]
            return texts if several else texts[0]
        row_options = {name: options.pop(name) for name in ROW_OPTIONS if name in options}
        processor = self._with(options)
        given = [images_of(c) for c in conversations] if images is None else nest_images(images)
        samples = [[processor.read(image) for image in sample] for sample in given]
        framing = processor._framing()
        pieces = [
            encode_messages(self.tokenizer, template, c, framing, add_generation_prompt, **variables)
            for c in conversations
        ]
        rows = [processor._spans_of(row, sample) for row, sample in zip(pieces, samples, strict=True)]
        image_processor = processor.image_processor.for_values_of(given)
        inputs = processor._assemble(rows, samples, image_processor, return_tensors, **row_options)
        if not several and not return_tensors:
            inputs |= {name: inputs[name][0] for name in ("input_ids", "attention_mask")}
        return inputs if return_dict else inputs["input_ids"]

    # Inside

    def _chat(self, source: str | None = None) -> ChatTemplate:
        source = self.named_templates.get(source or "", source) or self.chat_template
        cached = self.__dict__.get("_template")
        if cached is None or cached.source != source:
            cached = self.__dict__["_template"] = ChatTemplate(source, self.tokenizer.special_tokens_map)
        return cached

    def _framing(self) -> Framing:
        return Framing(self.tokenizer.affixes[0], self.opening, image=IMAGE, edge=FAKE)

    def _with(self: Self, settings: dict[str, Any]) -> Self:
        """This processor with other settings, for one call."""
        of_images = self.image_processor.setting_names()
        settings = known_alone(type(self).__name__, settings, (*self._own_settings(), *of_images))
        settings = {name: value for name, value in settings.items() if value is not None}
        if not settings:
            return self
        changed = copy.copy(self)
        for name in self._own_settings():
            setattr(changed, name, settings.get(name, getattr(self, name)))
            if name not in of_images:
                settings.pop(name, None)
        changed.image_processor = self.image_processor.replace(**settings)
        return changed

    def _spans(self, text: str, images: list[Image.Image], add_special_tokens: bool) -> list[Span]:
        """The ids of a text cut around its images, with what the tokenizer puts before and after."""
        prefix, suffix = self.tokenizer.affixes if add_special_tokens else ([], [])
        if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token):  # as chat templates write it
            prefix = []
        spans: list[Span] = [(prefix, False)]
        pieces = text.split(IMAGE)
        for number, piece in enumerate(pieces):
            if number:
                opening = [] if spans[-1][1] else self.opening
                spans.append((opening + self.image_ids(*images[number - 1].size).tolist(), True))
            piece = self.tokenizer.trim(piece, FAKE if number else None, FAKE if number < len(pieces) - 1 else None)
            if piece:
                place: Place = "after_token" if number else "start"
                spans.append((self.tokenizer.encode(piece, add_special_tokens=False, place=place), False))
        return [*spans, (suffix, False)]

    def _spans_of(self, pieces: list[Piece], images: list[Image.Image]) -> list[Span]:
        """The ids of pieces, with their images in place. Raises ValueError if there are more or fewer images."""
        places = sum(isinstance(piece, ImagePiece) for piece in pieces)
        if places != len(images):
            raise ValueError(f"The messages hold {places} images and {len(images)} are given: make the numbers equal.")
        spans: list[Span] = [([], False)]
        for piece in pieces:
            if isinstance(piece, TextPiece):
                spans.append((piece.ids.tolist(), False))
                continue
            opening = spans.pop()[0] if self.opening and spans[-1] == (self.opening, False) else []
            spans.append((opening + self.image_ids(*images[piece.image].size).tolist(), True))
        return [*spans, ([], False)]
