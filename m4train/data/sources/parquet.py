"""Hugging Face datasets in parquet: The Cauldron, FineVision, Docmatix (images and turns), OBELICS once its images are
fetched (parallel lists), and conversations with `messages` or `conversations`.

Parquet is read by row group, so the plan orders samples within windows of row groups, and each process keeps the last few.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from PIL import Image

from m4train.data.sample import Sample
from m4train.data.sources.base import Member, ScannedSample
from m4train.data.sources.records import (
    IMAGE_COLUMNS,
    OTHER_COLUMNS,
    TEXT_COLUMNS,
    image_column,
    image_member,
    record_sample,
    text_hash,
    unchanged,
)
from m4train.data.storage import FileReader, Range, is_remote
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.images import decode_image

KEPT_GROUPS = 4  # row groups per process


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

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        number = 0
        for group in range(len(self.blocks(files, path))):
            for row, record in enumerate(self._group(files, path, group)):
                yield self._scan_row(str(number), group, row, record)
                number += 1

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return sum(self.blocks(files, path))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        text = members[0]
        record = self._group(files, path, text.offset)[text.size]
        if text_hash(record) != text.hash:
            detail = f"row {text.size} of row group {text.offset} has other text than when it was indexed"
            raise BadSample("damaged", detail)
        return _compose(record)

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        stored = self.stored_images(files, path, members, wanted)
        return {number: decode_image(data) for number, data in zip(wanted, stored)}

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        chosen = [(number, members[1 + number]) for number in wanted]
        images = [_stored_images(self._group(files, path, m.offset)[m.size])[number] for number, m in chosen]
        return [unchanged(data, member, f"image {number}") for data, (number, member) in zip(images, chosen)]

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        return []

    def blocks(self, files: FileReader, path: str) -> list[int]:
        with _open(files, path) as file:
            metadata = file.metadata
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _scan_row(self, key: str, group: int, row: int, record: dict[str, Any]) -> ScannedSample:
        try:
            _compose(record)
            images = [image_member(data, n, group, row) for n, data in enumerate(_stored_images(record))]
            return ScannedSample(key, (Member(group, row, text_hash(record)), *images))
        except BadSample as error:
            return ScannedSample(key, bad=(error.reason, error.detail))

    def _group(self, files: FileReader, path: str, group: int) -> list[dict[str, Any]]:
        """The rows of a row group, from the few that are kept or from the file."""
        rows = self._groups.get((path, group))
        if rows is None:
            with _open(files, path) as file:
                columns = _columns(path, file.schema_arrow.names)
                rows = file.read_row_group(group, columns=columns).to_pylist()
            self.groups_read += 1
            self._groups[path, group] = rows
            if len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end((path, group))
        return rows


def _open(files: FileReader, path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Reading parquet needs pyarrow: install it, or convert the source to shards.") from None
    try:
        return pyarrow.parquet.ParquetFile(files.open(path) if is_remote(path) else path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is no readable parquet file: {error}.") from None


def _columns(path: str, names: Sequence[str]) -> list[str]:
    """The columns that are read, of all `names`. Raises DataError where they hold no sample."""
    if not set(names) & set(TEXT_COLUMNS):
        raise DataError(f"{path} has columns {list(names)} but none of {', '.join(TEXT_COLUMNS)}.")
    if "pdf" in names and not set(names) & set(IMAGE_COLUMNS):
        raise DataError(f"{path} holds its pages as pdf: render them to images first, or take the set's images.")
    return [name for name in names if name in (*IMAGE_COLUMNS, *TEXT_COLUMNS, *OTHER_COLUMNS)]


def _stored_images(record: dict[str, Any]) -> list[bytes]:
    images = []
    for number, image in enumerate(image_column(record)):
        data = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(data, bytes):
            images.append(data)
        elif image is not None:
            shown = image.get("path") if isinstance(image, dict) else image
            detail = f"image {number}, {str(shown)[:80]}, is not stored in the row: fetch the images first"
            raise BadSample("remote_image", detail)
    return images


def _compose(record: dict[str, Any]) -> Sample:
    _stored_images(record)
    numbers = count()
    return record_sample(record, [None if image is None else str(next(numbers)) for image in image_column(record)])
