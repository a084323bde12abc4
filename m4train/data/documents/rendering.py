"""From a sample to token ids: the pieces of the text, and the images expanded between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from m4train.config import ConversationOptions, DocumentOptions, ImageOptions, SourceConfig
from m4train.data.documents.pieces import IMAGE_KIND, PIECE_KINDS, Pieces
from m4train.data.documents.sample import Sample
from m4train.data.documents.variants import (
    Draws,
    View,
    conversation_variant,
    documents_in,
    image_numbers,
    image_views,
    viewed,
)
from m4train.errors import BadSample, ConfigError, StaleIndexError
from m4train.processing.pieces import EncodedImage, ImagePiece, Piece, TextPiece
from m4train.processing.protocol import SampleProcessor

_BORDER = TextPiece(np.empty(0, np.int64), "border")
_OBELICS_MARKER = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"  # comes between documents that one row holds
_ADVICE = "run `m4train data index` again"


@dataclass(frozen=True)
class Rendered:
    """Token ids of consecutive pieces.

    `ids` (T,) int64; `kinds` (T,) uint8, the `PIECE_KINDS` number of the piece each id belongs to; `turns` (T,) int32, the
    message each id belongs to (-1 for none); `feature_mask` (T,) True where an image feature goes; `frames` (F, 3, S, S)
    uint8 of each image, in order (or lists of frames of different sizes).
    """

    ids: np.ndarray
    kinds: np.ndarray
    turns: np.ndarray
    feature_mask: np.ndarray
    frames: list[Any]
    weights: np.ndarray | None = None  # (T,) float32, how much each id is learned, if any is other than 1


@dataclass(frozen=True)
class Prepared:
    """One variant of a sample: its pieces, whose images have their stored numbers; how each image is encoded; what the pieces
    take; and the weights of turns that have one other than 1, that of a document under -1."""

    pieces: list[Piece]
    views: dict[int, View]
    planned: Pieces
    weights: dict[int, float]


class Renderer:
    """Renders the samples of one source as its options say. Raises ConfigError for options the processor cannot follow."""

    def __init__(self, processor: SampleProcessor, config: SourceConfig, name: str = "") -> None:
        self.processor, self.config = processor, config
        self.documents, self.conversations, self.images = config.documents, config.conversations, config.images
        self._key = f"data.sources.{name or '*'}"
        random = self.conversations.shuffle_turns or self.conversations.newline_probability > 0
        random = random or (self.images.upscale_max > 1 and self.images.upscale_probability > 0)
        random = random or len(self.images.tiles) > 1
        self.variants = config.variants if random else 1
        if self.images != ImageOptions():
            _check_images(processor, self.images, f"{self._key}.images")

    def fingerprint(self) -> str:
        """Names everything that the pieces of a sample and their lengths depend on: the processor and the options."""
        images = replace(self.images, scaled_decode=False)
        if (self.documents, self.conversations, images) == (DocumentOptions(), ConversationOptions(), ImageOptions()):
            return self.processor.fingerprint()
        options = [asdict(each) for each in (self.documents, self.conversations, images)]
        if not images.tiles:
            del options[-1]["tiles"]  # so that indexes of before there was this key stay what they were
        described = json.dumps([self.processor.fingerprint(), options, self.variants], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def prepare(self, sample: Sample, key: str, sizes: Sequence[tuple[int, int]], variant: int = 0) -> Prepared:
        """One variant of a sample whose stored images have these (width, height). Raises BadSample, and ConfigError for a text
        that is not text but a marker, which would be trained on."""
        if len(sizes) != len(sample.images):
            detail = f"the sample names {len(sample.images)} images but holds {len(sizes)}"
            raise BadSample("image_count", detail)
        if self.documents.end_marker is None and any(_OBELICS_MARKER in i.get("text", "") for i in sample.items or ()):
            raise ConfigError(
                f"Sample {key!r} holds {_OBELICS_MARKER}, by which OBELICS divides documents, and would be trained on it: set "
                f"{self._key}.documents.end_marker={_OBELICS_MARKER}, which needs an index."
            )
        pieces, weights = self._pieces(sample, Draws(key, variant, "turns"))
        used = {piece.image: sizes[piece.image] for piece in pieces if isinstance(piece, ImagePiece)}
        views = image_views(used, self.images, self.processor, Draws(key, variant, "images"))
        tokens, kinds, frames = [], [], []
        for piece in pieces:
            if isinstance(piece, ImagePiece):
                view = views[piece.image]
                encoder, size = viewed(self.processor, view), view.size(*sizes[piece.image])
                tokens.append(encoder.tokens_for(*size))
                frames.append(encoder.frames_for(*size))
                kinds.append(IMAGE_KIND)
            else:
                tokens.append(len(piece.ids))
                frames.append(0)
                kinds.append(PIECE_KINDS.index(piece.origin))
        planned = Pieces(np.array(tokens, np.int32), np.array(kinds, np.uint8), np.array(frames, np.int32))
        return Prepared(pieces, views, planned, weights)

    def _pieces(self, sample: Sample, draws: Draws) -> tuple[list[Piece], dict[int, float]]:
        """The pieces in reading order, and the weights of turns; parts that are documents of their own are divided by pieces
        of kind border."""
        pieces: list[Piece] = []
        weights: dict[int, float] = {}
        if sample.items is None:
            assert sample.messages is not None
            messages = conversation_variant(sample.messages, self.conversations, draws)
            weights = {turn: message["weight"] for turn, message in enumerate(messages) if "weight" in message}
            messages = [{"role": message["role"], "content": message["content"]} for message in messages]
            items = [item for message in messages for item in message["content"]]
            pieces = _stored_numbers(self.processor.encode_messages(messages), image_numbers(items))
        else:
            weights = {-1: sample.weight} if sample.weight != 1 else {}
            for document in documents_in(sample.items, self.documents):
                pieces += [_BORDER] if pieces else []
                pieces += _stored_numbers(self.processor.encode_document(document), image_numbers(document))
        if not pieces:
            raise BadSample("empty", "the sample renders to no tokens")
        return pieces, weights


def _stored_numbers(pieces: Sequence[Piece], numbers: Sequence[int]) -> list[Piece]:
    """The pieces of some items, with the stored numbers of their images. Raises BadSample if they do not match."""
    places = [piece.image for piece in pieces if isinstance(piece, ImagePiece)]
    if places != list(range(len(numbers))):
        raise BadSample("image_count", f"the text has places for images {places} but the sample names {len(numbers)}")
    return [ImagePiece(numbers[piece.image]) if isinstance(piece, ImagePiece) else piece for piece in pieces]


def _check_images(processor: SampleProcessor, options: ImageOptions, key: str) -> None:
    one = processor.most_detail == 1
    if options.upscale_max > 1 and processor.fixed_size and (options.enlarge or one):
        raise ConfigError(
            f"{key}.upscale_max is {options.upscale_max}, but this processor resizes every image to the same size: "
            "set images.enlarge=false, or upscale_max=1."
        )
    if options.tiles and max(options.tiles) > processor.most_detail:
        raise ConfigError(
            f"{key}.tiles gives images up to {max(options.tiles)} tiles along their longest side, but this processor makes "
            f"{processor.most_detail} at most: name no more, or let model.processor.size make more."
        )
    if not options.enlarge and one:
        raise ConfigError(f"{key}.enlarge is false, but this processor knows only one number of frames: leave it true.")
    if options.scaled_decode and processor.needed_size(4096, 4096) is None:
        raise ConfigError(
            f"{key}.scaled_decode is true, but this processor cuts images before it resizes them: leave it false."
        )
    least = processor.at_detail(1).tokens_for(1, 1)
    for name in ("max_tokens", "max_tokens_per_sample"):
        limit = getattr(options, name)
        if limit is not None and limit < least:
            raise ConfigError(f"{key}.{name} is {limit}, but an image takes {least} tokens at least: raise it.")


def expand(
    pieces: Sequence[Piece],
    encoded: Mapping[int, EncodedImage],
    planned: Pieces,
    weights: Mapping[int, float] | None = None,
) -> Rendered:
    """The ids of a run of pieces, with each encoded image (by its number) in place, and the `weights` of its turns.

    Raises StaleIndexError if a piece does not have the length the index promised: the plan was made for another
    processor, and going on would overflow packs or shift labels.
    """
    if len(pieces) != len(planned.tokens):
        raise StaleIndexError(f"renders to {len(pieces)} pieces, but the index has {len(planned.tokens)}: {_ADVICE}")
    ids, kinds, turns, masks, frames = [], [], [], [], []
    for number, piece in enumerate(pieces):
        if isinstance(piece, TextPiece):
            piece_ids, mask = piece.ids, np.zeros(len(piece.ids), bool)
            kind, turn = PIECE_KINDS.index(piece.origin), piece.turn
        else:
            image = encoded[piece.image]
            piece_ids, mask, kind, turn = image.ids, image.feature_mask, IMAGE_KIND, -1
            frames.append(image.frames)
            if len(image.frames) != planned.frames[number]:
                raise StaleIndexError(
                    f"image {piece.image} has {len(image.frames)} frames, but the index has {planned.frames[number]}: {_ADVICE}"
                )
        if len(piece_ids) != planned.tokens[number] or kind != planned.kinds[number]:
            raise StaleIndexError(
                f"piece {number} has {len(piece_ids)} tokens ({PIECE_KINDS[kind]}), but the index has "
                f"{planned.tokens[number]} ({PIECE_KINDS[planned.kinds[number]]}): {_ADVICE}"
            )
        ids.append(np.asarray(piece_ids, np.int64))
        masks.append(mask)
        kinds.append(np.full(len(piece_ids), kind, np.uint8))
        turns.append(np.full(len(piece_ids), turn, np.int32))
    of_turn = np.concatenate(turns)
    learned = turn_weights(of_turn, weights or {})
    return Rendered(np.concatenate(ids), np.concatenate(kinds), of_turn, np.concatenate(masks), frames, learned)


def turn_weights(turns: np.ndarray, weights: Mapping[int, float]) -> np.ndarray | None:
    """(T,) float32, how much each token is learned, from its turn (T,) and the weights of turns, -1 being that of all others, as of
    a document; None if all are 1."""
    if not weights:
        return None
    learned = np.full(len(turns), weights.get(-1, 1.0), np.float32)
    for turn, weight in weights.items():
        learned[turns == turn] = weight
    return learned


def encode_view(
    image: Image.Image, view: View, processor: SampleProcessor, stored: tuple[int, int] | None = None
) -> EncodedImage:
    """The image encoded as `view` says; `stored` is the (width, height) of its file if it was decoded smaller."""
    encoder = viewed(processor, view)
    if stored is not None:
        return encoder.encode_image(image, stored)
    if view.scale != 1.0:
        image = image.resize(view.size(*image.size), Image.Resampling.BICUBIC)
    return encoder.encode_image(image)


def as_planned(image: Image.Image, planned: tuple[int, int], view: View, processor: SampleProcessor) -> Image.Image:
    """The image, stretched to its planned (width, height) if a crop has left it a size that takes other tokens."""
    if image.size == planned:
        return image
    encoder = viewed(processor, view)
    counts = [
        (encoder.tokens_for(*size), encoder.frames_for(*size)) for size in (view.size(*image.size), view.size(*planned))
    ]
    return image if counts[0] == counts[1] else image.resize(planned, Image.Resampling.BICUBIC)


def needed_sizes(
    views: Mapping[int, View], sizes: Mapping[int, tuple[int, int]], processor: SampleProcessor
) -> dict[int, tuple[int, int]]:
    """The smallest size each image may be decoded in; those whose every pixel is needed are left out."""
    found = {n: viewed(processor, view).needed_size(*sizes[n]) for n, view in views.items() if view.scale == 1.0}
    return {number: size for number, size in found.items() if size is not None}
