"""Tar layouts of other projects, read in place."""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image, ImageSequence

from m4train.data.documents.sample import Sample, sample_from_dict
from m4train.data.sources.dialogues import dialogue, question_answer_pairs
from m4train.data.sources.tar import Ref, TarLayout
from m4train.data.sources.tarfiles import TarMember
from m4train.errors import BadSample
from m4train.processing.images import to_rgb
from m4train.processing.inputs import from_base64

Named = Mapping[str, TarMember]
Read = Callable[[str], bytes]
_IMAGE_SUFFIX = re.compile(r"(?:^|\.)(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def _is_image(suffix: str) -> bool:
    return _IMAGE_SUFFIX.search(suffix) is not None


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", f"a text is not UTF-8: {error}") from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON in UTF-8: {error}") from None


def _need(named: Named, suffix: str) -> None:
    if suffix not in named:
        raise BadSample("missing_member", f"no member {suffix!r} among {sorted(named)}")


class _Numbered(TarLayout):
    """The layouts of the Idefics trainer m4: `K.{i}.image.jpeg`, `K.{i}.text.txt`, i counting both from 0 without a gap, and
    `K.metadata.txt`, a list of them all."""

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        texts: list[Ref] = []
        images: list[Ref] = []
        for suffix in named:
            number, _, kind = suffix.partition(".")
            if number.isdecimal() and kind.startswith(("text.", "image.")):
                (texts if kind.startswith("text.") else images).append(Ref(suffix, int(number)))
        if not texts:
            raise BadSample("missing_member", f"no numbered text among {sorted(named)}")
        _check_numbers([*texts, *images], key)
        if "metadata.txt" in named:
            _check_listed(_text(read("metadata.txt")), key, named)
        return sorted(texts, key=lambda ref: ref.part), sorted(images, key=lambda ref: ref.part)


def _check_numbers(refs: Sequence[Ref], key: str) -> None:
    """Raises BadSample unless the parts are numbered 0, 1, 2 ...: a gap is a lost part, and not every sample lists its parts."""
    numbers = sorted(ref.part for ref in refs)
    for number, found in enumerate(numbers):
        if found < number:
            twice = sorted(ref.suffix for ref in refs if ref.part == found)
            raise BadSample("duplicate_member", f"{key} has two parts numbered {found}: {', '.join(twice)}")
        if found > number:
            raise BadSample("missing_member", f"{key} has no part numbered {number}, but one numbered {numbers[-1]}")


def _check_listed(metadata: str, key: str, named: Named) -> None:
    """Raises BadSample if `K.metadata.txt` lists a member that the shard does not hold."""
    try:
        listed = ast.literal_eval(metadata)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        listed = None
    if not isinstance(listed, (list, tuple)):
        raise BadSample("bad_text", "metadata.txt is not a list of member names")
    lost = [name for name in listed if str(name).removeprefix(key + ".") not in named]
    if lost:
        raise BadSample("missing_member", f"metadata.txt lists {lost[0]!r}, which the shard does not hold")


class M4Documents(_Numbered):
    """Web documents of m4: texts and images numbered in reading order."""

    name = "m4_documents"

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        items: dict[int, dict[str, str]] = {part: {"image": f"{part}"} for part in images}
        items |= {part: {"text": _text(data)} for part, data in texts}
        return sample_from_dict({"items": [items[part] for part in sorted(items)]})


class M4Conversations(_Numbered):
    """Instruction data of m4: the images, then the turns as JSON, in one text or going on in the next."""

    name = "m4_conversations"

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        texts, images = super().find(key, named, read)
        if images and images[-1].part > texts[0].part:
            detail = f"image {images[-1].suffix!r} follows {texts[0].suffix!r}, but images must come before all turns"
            raise BadSample("image_order", detail)
        return texts, images

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        turns = []
        for part, data in texts:
            more = _json(data)
            if not isinstance(more, list):
                raise BadSample("bad_json", f"text {part} is a {type(more).__name__}, but must be a list of turns")
            turns += more
        return question_answer_pairs(turns, [str(part) for part in images])


class Pairs(TarLayout):
    """One image and its text: `K.jpg` and `K.txt`, or the `caption` in `K.json` (img2dataset, LAION, COYO); also m4's
    `K.image.jpeg` and `K.text.txt`, and its `K.question.txt` and `K.answer.txt`. `K.json` also says the `url`."""

    name = "pairs"
    _QUESTION, _ANSWER, _CAPTION, _RECORD = range(4)

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        images = [Ref(suffix) for suffix in named if _is_image(suffix)]
        if len(images) != 1:
            raise BadSample("missing_image", f"one image is expected among {sorted(named)}")
        record = [Ref("json", self._RECORD)] if "json" in named else []
        if "question.txt" in named:
            _need(named, "answer.txt")
            return [Ref("question.txt", self._QUESTION), Ref("answer.txt", self._ANSWER), *record], images
        text = next((suffix for suffix in ("txt", "text.txt") if suffix in named), None)
        if text is not None:
            return [Ref(text, self._CAPTION), *record], images
        _need(named, "json")
        return record, images

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        found = dict(texts)
        record = _json(found[self._RECORD]) if self._RECORD in found else {}
        if not isinstance(record, dict):
            raise BadSample("bad_json", f"the record is a {type(record).__name__} where an object is expected")
        source = {"url": record["url"]} if record.get("url") else {}
        if self._QUESTION in found:
            turn = {"user": _text(found[self._QUESTION]), "assistant": _text(found[self._ANSWER])}
            return replace(question_answer_pairs([turn], ["0"]), source=source)
        caption = _text(found[self._CAPTION]) if self._CAPTION in found else record.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise BadSample("no_text", "the image has no caption")
        return sample_from_dict({"items": [{"image": "0"}, {"text": caption}], "source": source})


class EnergonInterleaved(TarLayout):
    """`K.json` with parallel lists `images` (names or null) and `texts` (strings or null), one of the two at each place."""

    name = "energon"

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        _need(named, "json")
        return [Ref("json")], [Ref(item["image"]) for item in self.compose([(0, read("json"))], []).image_items()]

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return interleaved(_json(texts[0][1]))


class Mint1T(TarLayout):
    """MINT-1T's PDFs: as Energon's layout, with all images as frames of one `K.tiff`, in the order of the names.

    A lost frame would give every image behind it another one's picture, so their number and `image_metadata` are compared.
    """

    name = "mint1t"

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        _need(named, "json")
        record = _json(read("json"))
        images = interleaved(record).images
        file = next((suffix for suffix in ("tiff", "tif") if suffix in named), "tiff")
        if file in named:
            _check_frames(self._sizes(read(file)), images, record.get("image_metadata"))
        return [Ref("json")], [Ref(file, part) for part in range(len(images))]

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return interleaved(_json(texts[0][1]))

    def picture_size(self, data: bytes, part: int) -> tuple[int, int]:
        return self._frame(data, part, lambda image: image.size)

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


class Mmc4(TarLayout):
    """MMC4 with its images in the JSON: `text_list`, and `image_info` with `image_base64` and `matched_text_index`.

    An image comes before the sentence it was matched with, images of one sentence in the order of `image_info`; without a
    match, before the sentence that `similarity_matrix` finds closest. Entries without bytes are left out.
    """

    name = "mmc4"

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        _need(named, "json")
        images = self.compose([(0, read("json"))], []).images
        return [Ref("json")], [Ref("json", int(name)) for name in images]

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        record = _json(texts[0][1])
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
        return sample_from_dict({"items": items, "source": {"url": record.get("url")}})

    def picture_size(self, data: bytes, part: int) -> tuple[int, int]:
        return super().picture_size(self.file_of(data, part), part)

    def picture(self, data: bytes, part: int) -> Image.Image:
        return super().picture(self.file_of(data, part), part)

    def file_of(self, data: bytes, part: int) -> bytes:
        return from_base64(_json(data)["image_info"][part]["image_base64"])


class LlavaOneVision(TarLayout):
    """LLaVA-OneVision-1.5: `K.json` with `texts` (role and content) and `name`, and one image `K.jpg` or several `K.{i}_{name}`.

    The images are those of `name`, in its order; without it, all there are, in the order of their numbers. The variant that
    packs several samples into one (`images`, `prompts`, `captions`) is refused.
    """

    name = "llava_onevision"

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        _need(named, "json")
        record = _json(read("json"))
        if isinstance(record, dict) and "captions" in record and "texts" not in record:
            detail = "the packed variant (`images`, `prompts`, `captions`) is not read: use the set before packing"
            raise BadSample("packed_variant", detail)
        stored = sorted((suffix for suffix in named if _is_image(suffix)), key=_leading_number)
        names = record.get("name") if isinstance(record, dict) else None
        refs = [Ref(suffix, part) for part, suffix in enumerate(_in_order(names, stored) if names else stored)]
        self.compose([(0, read("json"))], range(len(refs)))
        return [Ref("json")], refs

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return dialogue(_json(texts[0][1]), [str(part) for part in images])


def _in_order(names: Any, stored: Sequence[str]) -> list[str]:
    """The member of each of the `names`: `{name}`, `{i}_{name}`, or the only one, `K.jpg`; the name itself if none is."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample("bad_json", "`name` must be a list of image names")
    if len(names) == len(stored) == 1 and "." not in stored[0]:
        return list(stored)
    candidates = [(name, f"{place}_{name}") for place, name in enumerate(names)]
    return [next((suffix for suffix in some if suffix in stored), some[0]) for some in candidates]


def interleaved(record: Any) -> Sample:
    """A document of parallel lists `images` and `texts`, of which exactly one has something at each place. Raises BadSample."""
    images, texts = _field(record, "images", list), _field(record, "texts", list)
    if len(images) != len(texts):
        raise BadSample("image_count", f"`images` has {len(images)} places but `texts` {len(texts)}")
    items = []
    for place, (image, text) in enumerate(zip(images, texts)):
        if (image is None) == (text is None):
            raise BadSample(
                "bad_json", f"place {place} holds {'both' if text is not None else 'neither'} text and image"
            )
        items.append({"text": text} if image is None else {"image": str(image)})
    return sample_from_dict({"items": items, "source": {"url": record.get("url")}})


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
            "bad_json", f"image {number} is matched with sentence {match!r} of {sentences}, which does not exist"
        )
    return match


def _leading_number(suffix: str) -> tuple[int, str]:
    number = re.match(r"\d+", os.path.basename(suffix))
    return (int(number[0]) if number else -1), suffix
