"""What the options of a source make of a sample before it becomes tokens: which items, in which order, how large.

Random choices are made by numbered variants: variant v of a sample is a function of its key and v alone, the index knows
the length of each, and the plan draws v from (seed, epoch, sample).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m4train.config import ConversationOptions, DocumentOptions, ImageOptions
from m4train.errors import BadSample
from m4train.processing.protocol import SampleProcessor

Item = dict[str, Any]
_BREAK = {"text": "\n\n"}  # stands for images that were left out between two texts


class Draws:
    """Numbers that depend on what they are drawn for alone."""

    def __init__(self, *name: Any) -> None:
        self._name = "\0".join(map(str, name)).encode()
        self._count = 0

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        self._count += 1
        digest = hashlib.blake2b(self._name + b"\0%d" % self._count, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def order(self, count: int) -> list[int]:
        """A random order of range(count)."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = int(self.uniform() * (last + 1))
            order[last], order[other] = order[other], order[last]
        return order


def variant_drawn(variants: int, seed: int, epoch: int, source: str, sample: int) -> int:
    """Which of the `variants` of a sample (its number in the source) is used in an epoch."""
    return int(Draws(seed, epoch, source, sample).uniform() * variants) if variants > 1 else 0


def numbered(items: Sequence[Item], first: int = 0) -> list[Item]:
    """The items, with the number of every image in reading order as its `number`."""
    result = []
    for item in items:
        if "image" in item:
            item, first = item | {"number": first}, first + 1
        result.append(item)
    return result


def image_numbers(items: Sequence[Item]) -> list[int]:
    """The numbers of the images among numbered items."""
    return [item["number"] for item in items if "image" in item]


def documents_in(items: Sequence[Item], options: DocumentOptions) -> list[list[Item]]:
    """The documents that a stored one becomes, of numbered items. Raises BadSample `skipped` if none is left."""
    documents, why = [], ""
    for document in _cut_at_marker(numbered(items), options.end_marker):
        document = _first_images(document, options.max_images)
        if options.ending_images == "strip":
            while document and "image" in document[-1]:
                document.pop()
        reason = _reason_to_skip(document, options)
        if reason:
            why = reason
        else:
            documents.append(document)
    if not documents:
        raise BadSample("skipped", f"the options of its source leave it out: {why or 'it holds nothing'}")
    return documents


def _cut_at_marker(items: Sequence[Item], marker: str | None) -> list[list[Item]]:
    documents: list[list[Item]] = [[]]
    for item in items:
        texts = item["text"].split(marker) if marker and "text" in item else []
        if len(texts) < 2:
            documents[-1].append(item)
            continue
        for place, text in enumerate(texts):
            if place:
                documents.append([])
            if text.strip():
                documents[-1].append({"text": text.strip()})
    return [document for document in documents if document]


def _first_images(items: list[Item], limit: int | None) -> list[Item]:
    """The items without the images past `limit`, and a paragraph's end wherever that would join two texts."""
    if limit is None:
        return items
    kept: list[Item] = []
    images, gap = 0, False
    for item in items:
        if "image" in item:
            images += 1
            if images > limit:
                gap = True
                continue
        elif gap and kept and "text" in kept[-1]:
            kept.append(_BREAK)
        kept.append(item)
        gap = False
    return kept


def _reason_to_skip(items: Sequence[Item], options: DocumentOptions) -> str:
    """Why a document is not used; empty if it is."""
    pictured = ["image" in item for item in items]
    if not items:
        return "it holds nothing but images at its end"
    if options.require_image and not any(pictured):
        return "it has no image"
    if options.ending_images == "skip":
        if pictured[-2:] == [True, True]:
            return "it ends in two images"
        if pictured[-1] and sum(pictured) == 1:
            return "its only image is at its end, where no text sees it"
    longest = run = 0
    for picture in pictured:
        run = run + 1 if picture else 0
        longest = max(longest, run)
    if options.max_images_in_a_row is not None and longest > options.max_images_in_a_row:
        return f"it has {longest} images in a row"
    return ""


def conversation_variant(messages: Sequence[Item], options: ConversationOptions, draws: Draws) -> list[Item]:
    """The messages of a conversation as one variant has them, with numbered images."""
    result, images = [], 0
    for message in messages:
        items = numbered(message["content"], images)
        images += sum("image" in item for item in items)
        result.append(message | {"content": items})
    if options.shuffle_turns:
        result = _shuffled(result, draws)
    if options.newline_probability:
        result = [_with_newline(message, options.newline_probability, draws) for message in result]
    if options.system_prompt is not None and result[0]["role"] != "system":
        result.insert(0, {"role": "system", "content": [{"text": options.system_prompt}]})
    return result


def _shuffled(messages: list[Item], draws: Draws) -> list[Item]:
    """The exchanges (a user's message and what follows it) in another order; the images that the first begins with stay first,
    as all of them may be about those."""
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
    exchanges = [messages[start:end] for start, end in zip(starts, [*starts[1:], len(messages)])]
    if len(exchanges) < 2:
        return messages
    items = exchanges[0][0]["content"]
    leading = next((place for place, item in enumerate(items) if "image" not in item), 0)
    exchanges[0] = [exchanges[0][0] | {"content": items[leading:]}, *exchanges[0][1:]]
    exchanges = [exchanges[place] for place in draws.order(len(exchanges))]
    first = exchanges[0][0]
    exchanges[0] = [first | {"content": items[:leading] + first["content"]}, *exchanges[0][1:]]
    return [*messages[: starts[0]], *(message for exchange in exchanges for message in exchange)]


def _with_newline(message: Item, probability: float, draws: Draws) -> Item:
    """A user's message with, at random, a line break before its first text."""
    if message["role"] != "user" or draws.uniform() >= probability:
        return message
    items = list(message["content"])
    place = next((place for place, item in enumerate(items) if "text" in item), None)
    if place is not None:
        items[place] = {"text": "\n" + items[place]["text"]}
    return message | {"content": items}


@dataclass(frozen=True)
class View:
    """How an image is encoded: enlarged by `scale` first, then by the processor at `detail` (None: as it is)."""

    scale: float = 1.0
    detail: int | None = None

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size of an image after the first step."""
        return (width, height) if self.scale == 1.0 else (round(width * self.scale), round(height * self.scale))


def image_views(
    sizes: dict[int, tuple[int, int]], options: ImageOptions, processor: SampleProcessor, draws: Draws
) -> dict[int, View]:
    """How each image (its number -> width, height) is encoded. Raises BadSample `skipped` if the images of the
    sample do not fit their budget however small they are made."""
    if options == ImageOptions(scaled_decode=options.scaled_decode):
        return dict.fromkeys(sizes, View())
    views: dict[int, View] = {}
    for number, (width, height) in sorted(sizes.items()):
        scale = 1.0
        if options.upscale_max > 1 and draws.uniform() < options.upscale_probability:
            scale += (options.upscale_max - 1) * draws.uniform()
        size = View(scale).size(width, height)
        detail = processor.most_detail if options.enlarge else processor.natural_detail(*size)
        if options.tiles:
            detail = min(detail, _drawn(options.tiles, draws.uniform()))
        if options.max_tokens is not None:
            while detail > 1 and processor.at_detail(detail).tokens_for(*size) > options.max_tokens:
                detail -= 1
        views[number] = View(scale, detail)
    limit = options.max_tokens_per_sample
    if limit is None:
        return views
    while True:
        total = sum(view_tokens(processor, view, sizes[number]) for number, view in views.items())
        most = max((view.detail or 1 for view in views.values()), default=1)
        if total <= limit:
            return views
        if most == 1:
            raise BadSample("skipped", f"its {len(sizes)} images take {total} tokens at least, above {limit}")
        views = {n: View(view.scale, min(view.detail or 1, most - 1)) for n, view in views.items()}


def _drawn(shares: dict[int, float], draw: float) -> int:
    """The number that a draw from 0 to below 1 falls on, when each number takes its share of that range."""
    reached, total = 0.0, sum(shares.values())
    for number, share in sorted(shares.items()):
        reached += share / total
        if draw < reached:
            return number
    return max(shares)


def view_tokens(processor: SampleProcessor, view: View, size: tuple[int, int]) -> int:
    """Tokens of an image of this size in a view."""
    return viewed(processor, view).tokens_for(*view.size(*size))


def viewed(processor: SampleProcessor, view: View) -> Any:
    """The processor that encodes images of a view."""
    return processor if view.detail is None else processor.at_detail(view.detail)
