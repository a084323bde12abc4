"""Tar formats of web documents, read in place: Energon's parallel lists, MINT-1T and MMC4."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image, ImageSequence

from m4train.data.documents.sample import Sample, sample_from_dict
from m4train.data.sources.fields import Reading, Record
from m4train.data.sources.media import words
from m4train.data.sources.records import Composed, checked, compose, learning
from m4train.data.sources.tar import Ref, TarFormat
from m4train.data.sources.tar_formats import Named, Read, json_of, need
from m4train.errors import BadSample, described
from m4train.processing.images import to_rgb
from m4train.processing.inputs import from_base64


class EnergonInterleaved(TarFormat):
    """`K.json` with parallel lists `images` (names or null) and `texts` (strings or null), one of the two at each place."""

    name = "energon"
    honours = frozenset({"fields", "where", "missing_images"})

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        need(named, "json")
        composed = _parallel(read("json"), self.reading)
        return [Ref("json")], [Ref(str(composed.pictures[int(name)])) for name in composed.sample.images]

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return _parallel(texts[0][1], self.reading).sample

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record:
        return _parallel(texts[0][1], self.reading).record


# What MINT-1T says of its documents: scores of languages, counts of duplicates.
_MINT = words(
    "image_metadata language_id_whole_page_fasttext previous_word_count next_word_count "
    "bff_contained_ngram_count_before_dedupe bff_duplicate_paragraph_spans pdf_name doc_pdf"
)


class Mint1T(TarFormat):
    """MINT-1T's PDFs: as Energon's format, with all images as frames of one `K.tiff`, in the order of the names.

    A lost frame would give every image behind it another one's picture, so their number and `image_metadata` are compared.
    """

    name = "mint1t"
    honours = frozenset({"fields", "where"})

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        need(named, "json")
        composed = _parallel(read("json"), self.reading)
        images = [str(picture) for picture in composed.pictures]
        file = next((suffix for suffix in named if suffix.lower() in ("tiff", "tif")), "tiff")
        if file in named:
            _check_frames(self._sizes(read(file)), images, composed.record.content.get("image_metadata"))
        return [Ref("json")], [Ref(file, part) for part in range(len(images))]

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return _parallel(texts[0][1], self.reading).sample

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record:
        record = _parallel(texts[0][1], self.reading).record
        record.leave(*_MINT)
        return record

    def picture_size(self, data: bytes, part: int) -> tuple[int, int]:
        return self._frame(data, part, lambda image: image.size)

    def frames(self, data: bytes, part: int) -> int:
        return 1  # each frame is an image of the document

    def picture(self, data: bytes, part: int) -> Image.Image:
        def decoded(image: Image.Image) -> Image.Image:
            image.load()
            return to_rgb(image, self.image_range)

        return self._frame(data, part, decoded)

    def file_of(self, data: bytes, part: int) -> bytes:
        """A frame is not a file of its own: without loss, as PNG."""
        buffer = io.BytesIO()
        self._frame(data, part, lambda image: image.copy()).save(buffer, "png")
        return buffer.getvalue()

    def _sizes(self, data: bytes) -> list[tuple[int, int]]:
        """Width and height of every frame."""

        def each(image: Image.Image) -> list[tuple[int, int]]:
            return [frame.size for frame in ImageSequence.Iterator(image)]

        return self._frame(data, 0, each)

    def _frame(self, data: bytes, part: int, use: Callable[[Image.Image], Any]) -> Any:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.seek(part)
                return use(image)
        except BadSample:
            raise
        except Exception as error:
            raise BadSample("unreadable_image", f"frame {part} of the tiff cannot be read: {error}") from None


def _check_frames(sizes: Sequence[tuple[int, int]], names: Sequence[str], metadata: Any) -> None:
    """Raises BadSample unless the frames of these sizes are as many as the names, and as large as `image_metadata` says."""
    if len(sizes) != len(names):
        raise BadSample("image_count", f"{len(sizes)} frames for {len(names)} image names")
    known = [entry for entry in metadata or () if isinstance(entry, dict)] if isinstance(metadata, list) else []
    if known and len(known) != len(names):
        raise BadSample("image_count", f"`image_metadata` describes {len(known)} images, `images` {len(names)}")
    for part, (entry, size) in enumerate(zip(known, sizes)):
        said = entry.get("width"), entry.get("height")
        if None not in said and said != size:
            detail = f"frame {part} has the size {size}, but `image_metadata` says {said} of {names[part]!r}"
            raise BadSample("image_count", detail)


# What MMC4 says of an image; entries without bytes are pictures that were not fetched, and left out.
_MMC4 = words("image_base64 image_name raw_url matched_text_index matched_sim face_detections")


class Mmc4(TarFormat):
    """MMC4 with its images in the JSON: `text_list`, and `image_info` with `image_base64` and `matched_text_index`.

    An image comes before the sentence it was matched with, images of one sentence in the order of `image_info`; without a
    match, before the sentence that `similarity_matrix` finds closest. Entries without bytes are left out.
    """

    name = "mmc4"
    honours = frozenset({"where"})

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        need(named, "json")
        images = self.compose([(0, read("json"))], []).images
        return [Ref("json")], [Ref("json", int(name)) for name in images]

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        record = json_of(texts[0][1])
        self.reading.check_where(record if isinstance(record, dict) else {})
        sentences, infos = _field(record, "text_list", list), _field(record, "image_info", list)
        before: dict[int, list[dict[str, str]]] = {}
        for number, info in enumerate(infos):
            if not isinstance(info, dict) or not isinstance(info.get("image_base64") or "", str):
                raise BadSample("bad_json", f"image_info[{number}] must be an object with `image_base64` as a string")
            if info.get("image_base64"):
                place = _sentence_of(record, info, number, len(sentences))
                before.setdefault(place, []).append({"image": str(number)})
        items: list[dict[str, str]] = []
        for number, sentence in enumerate(sentences):
            if not isinstance(sentence, str):
                raise BadSample("bad_json", f"text_list[{number}] is a {type(sentence).__name__}, not a string")
            items += [*before.get(number, []), {"text": sentence if number == 0 else " " + sentence}]
        data = {"items": items, "source": {"url": record.get("url")}} | learning(Record(record, self.reading))
        return checked(sample_from_dict(data), self.reading)

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record:
        record = Record(json_of(texts[0][1]), self.reading)
        record.leave(
            "text_list",
            "image_info",
            "url",
            "similarity_matrix",
            "could_have_url_duplicate",
            *self.reading.where_fields,
        )
        learning(record)
        for info in record.content["image_info"]:
            record.part(info, "image_info[]").leave(*_MMC4)
        return record

    def picture_size(self, data: bytes, part: int) -> tuple[int, int]:
        return super().picture_size(self.file_of(data, part), part)

    def frames(self, data: bytes, part: int) -> int:
        return super().frames(self.file_of(data, part), part)

    def picture(self, data: bytes, part: int) -> Image.Image:
        return super().picture(self.file_of(data, part), part)

    def file_of(self, data: bytes, part: int) -> bytes:
        return from_base64(json_of(data)["image_info"][part]["image_base64"])


def _parallel(raw: bytes, reading: Reading) -> Composed:
    """A document of parallel lists `images` and `texts`. Raises BadSample."""
    composed = compose(json_of(raw), reading)
    if not composed.interleaved:
        raise BadSample("bad_json", "`texts` must be a list of strings and nulls")
    return composed


def _field(record: Any, name: str, kind: type) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(name), kind):
        raise BadSample("bad_json", f"`{name}` must be a {kind.__name__}")
    return record[name]


def _sentence_of(record: dict[str, Any], info: dict[str, Any], number: int, sentences: int) -> int:
    """The sentence that image `number` was matched with, one of so many. Raises BadSample."""
    match = info.get("matched_text_index")
    if match is None:
        try:
            row = record["similarity_matrix"][number]
            match = max(range(len(row)), key=row.__getitem__)
        except (KeyError, IndexError, TypeError, ValueError):
            raise BadSample("bad_json", f"image {number} is matched with no sentence") from None
    if type(match) is not int or not 0 <= match < sentences:
        raise BadSample(
            "bad_json",
            f"image {number} is matched with sentence {described(match)} of {sentences}, which does not exist",
        )
    return match
