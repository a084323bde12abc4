"""Hugging Face datasets in parquet: The Cauldron, FineVision, Docmatix (images and turns), OBELICS once its images are
fetched (parallel lists), and conversations with `messages` or `conversations`.

Parquet is read by row group, so the plan orders samples within windows of row groups, and each process keeps the last few.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from m4train.data.sample import Sample
from m4train.data.sources.base import FileReader, Member, ScannedSample, content_hash
from m4train.data.sources.dialogues import dialogue, question_answer_pairs
from m4train.data.sources.tar_layouts import interleaved
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.images import decode_image, read_image_info

_IMAGE_COLUMNS = ("images", "image")
_TEXT_COLUMNS = ("texts", "messages", "conversations")
_KEPT = 4  # row groups per process


class ParquetRows:
    """One sample a row. A member's `offset` is its row group, `size` its row in it, `part` the number of the image."""

    name = "parquet"

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int], list[dict[str, Any]]] = OrderedDict()
        self.groups_read = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def scan(self, path: str) -> Iterator[ScannedSample]:
        number = 0
        for group in range(len(self.blocks(path))):
            for row, record in enumerate(self._group(path, group)):
                yield self._scan_row(str(number), group, row, record)
                number += 1

    def count(self, path: str, limit: int) -> int:
        return sum(self.blocks(path))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        text = members[0]
        record = self._group(path, text.offset)[text.size]
        if _text_hash(record) != text.hash:
            raise BadSample(
                "damaged", f"row {text.size} of row group {text.offset} has other text than when it was indexed"
            )
        return _compose(record)

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        stored = self.stored_images(files, path, members, wanted)
        return {number: decode_image(data) for number, data in zip(wanted, stored)}

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        found = []
        for number in wanted:
            member = members[1 + number]
            data = _stored_images(self._group(path, member.offset)[member.size])[number]
            if content_hash(data) != member.hash:
                raise BadSample("damaged", f"image {number} has other bytes than when it was indexed")
            found.append(data)
        return found

    def blocks(self, path: str) -> list[int]:
        with _open(path) as file:
            metadata = file.metadata
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _scan_row(self, key: str, group: int, row: int, record: dict[str, Any]) -> ScannedSample:
        try:
            _compose(record)
            members = [Member(group, row, _text_hash(record))]
            for part, data in enumerate(_stored_images(record)):
                info = read_image_info(data)
                members.append(Member(group, row, content_hash(data), info.width, info.height, part))
            return ScannedSample(key, tuple(members))
        except BadSample as error:
            return ScannedSample(key, bad=(error.reason, error.detail))

    def _group(self, path: str, group: int) -> list[dict[str, Any]]:
        """The rows of a row group, from the few that are kept or from the file."""
        rows = self._groups.get((path, group))
        if rows is None:
            with _open(path) as file:
                columns = [name for name in file.schema_arrow.names if name in (*_IMAGE_COLUMNS, *_TEXT_COLUMNS, "url")]
                if not set(columns) & set(_TEXT_COLUMNS):
                    raise DataError(
                        f"{path} has columns {file.schema_arrow.names} but none of {', '.join(_TEXT_COLUMNS)}."
                    )
                rows = file.read_row_group(group, columns=columns).to_pylist()
            self.groups_read += 1
            self._groups[path, group] = rows
            if len(self._groups) > _KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end((path, group))
        return rows


def _open(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Reading parquet needs pyarrow: install it, or convert the source to shards.") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is no readable parquet file: {error}.") from None


def _image_column(record: dict[str, Any]) -> list[Any]:
    value: Any = next((record[name] for name in _IMAGE_COLUMNS if record.get(name) is not None), [])
    return value if isinstance(value, list) else [value]


def _stored_images(record: dict[str, Any]) -> list[bytes]:
    images = []
    for image in _image_column(record):
        data = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(data, bytes):
            images.append(data)
        elif image is not None:
            shown = image.get("path") if isinstance(image, dict) else image
            raise BadSample("remote_image", f"{str(shown)[:80]} is not stored in the row: fetch the images first")
    return images


def _compose(record: dict[str, Any]) -> Sample:
    images = _stored_images(record)
    texts = record.get("texts")
    if not texts:
        return dialogue(record, [str(number) for number in range(len(images))])
    if any(isinstance(text, dict) for text in texts):
        return question_answer_pairs(texts, len(images))
    places = [None if image is None else str(place) for place, image in enumerate(_image_column(record))]
    return interleaved({"images": places, "texts": texts, "url": record.get("url")})


def _text_hash(record: dict[str, Any]) -> int:
    text = {name: record[name] for name in _TEXT_COLUMNS if record.get(name) is not None}
    return content_hash(json.dumps(text, default=str, sort_keys=True).encode())
