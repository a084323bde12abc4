"""Hugging Face datasets in parquet: The Cauldron, FineVision, Docmatix (images and turns), OBELICS once its images are
fetched (parallel lists), and conversations with `messages` or `conversations`.

Parquet is read by row group, so the plan orders samples within windows of row groups, and each process keeps those of two
windows, as Arrow tables: a row becomes Python objects only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from PIL import Image

from m4train.data.documents.sample import Sample
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
from m4train.data.storage.files import FileReader, Range, is_remote
from m4train.data.storage.kept_blocks import KeptBlocks
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.images import decode_image


class ParquetRows:
    """One sample a row. A member's `offset` is its row group, `size` its row in it, `part` the number of the image."""

    name = "parquet"
    settings: Mapping[str, Any] = {}
    image_range: Sequence[float] = ()

    def __init__(self, window: int = 1, pool: int = 0) -> None:
        self.keep(window, pool)

    def keep(self, window: int, pool: int) -> None:
        """Prepares for samples drawn within `window` row groups and packed from a `pool`."""
        self._kept: KeptBlocks[Any] = KeptBlocks(window, pool)
        self.groups_read = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            ParquetRows,
            (self._kept.window, self._kept.pool),
            {"image_range": self.image_range, "settings": self.settings},
        )

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        number = 0
        for group, rows in enumerate(self.blocks(files, path)):
            try:
                self._group(files, path, group)
            except BadSample as error:  # once for all its rows, which would each read it again
                bad = (error.reason, error.detail)
                yield from (ScannedSample(str(number + row), bad=bad) for row in range(rows))
            else:
                yield from (self._scan_row(files, path, str(number + row), group, row) for row in range(rows))
            number += rows

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return sum(self.blocks(files, path))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        text = members[0]
        record = self._row(files, path, text.offset, text.size)
        if text_hash(record) != text.hash:
            detail = f"row {text.size} of row group {text.offset} has other text than when it was indexed"
            raise BadSample("damaged", detail)
        return _compose(record)

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        stored = self.stored_images(files, path, members, wanted)
        return {number: decode_image(data, image_range=self.image_range) for number, data in zip(wanted, stored)}

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        images = _stored_images(self._row(files, path, members[0].offset, members[0].size)) if wanted else []
        if wanted and len(images) != len(members) - 1:
            raise BadSample("damaged", f"the row holds {len(images)} images, but held {len(members) - 1} when indexed")
        return [unchanged(images[number], members[1 + number], f"image {number}") for number in wanted]

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        return []

    def blocks(self, files: FileReader, path: str) -> list[int]:
        with _open(files, path) as file:
            metadata = file.metadata
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _scan_row(self, files: FileReader, path: str, key: str, group: int, row: int) -> ScannedSample:
        try:
            record = self._row(files, path, group, row)
            _compose(record)
            images = [image_member(data, n, group, row) for n, data in enumerate(_stored_images(record))]
            return ScannedSample(key, (Member(group, row, text_hash(record)), *images))
        except BadSample as error:
            return ScannedSample(key, bad=(error.reason, error.detail))

    def _row(self, files: FileReader, path: str, group: int, row: int) -> dict[str, Any]:
        table = self._group(files, path, group)
        with _named_damage():
            return table.slice(row, 1).to_pylist()[0]

    def _group(self, files: FileReader, path: str, group: int) -> Any:
        """The table of a row group, from those that are kept or from the file."""
        table = self._kept.get((path, group))
        if table is None:
            with _open(files, path) as file:
                table = file.read_row_group(group, columns=_columns(path, file.schema_arrow.names))
            self.groups_read += 1
            self._kept.add((path, group), table, len(table))
        return table


@contextmanager
def _open(files: FileReader, path: str) -> Iterator[Any]:
    """The open file. Raises DataError if it is not a parquet file, and BadSample if what is read of it is damaged."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Reading parquet needs pyarrow: install it, or convert the source to shards.") from None
    try:
        opened = pyarrow.parquet.ParquetFile(files.open(path) if is_remote(path) else path)
    except (pyarrow.ArrowException, OSError) as error:
        if _failed_to_read(error):
            raise
        raise DataError(f"{path} is not a readable parquet file: {error}.") from None
    with opened as file, _named_damage():
        yield file


@contextmanager
def _named_damage() -> Iterator[None]:
    """Raises BadSample for what pyarrow says of damaged content."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
        if _failed_to_read(error):
            raise
        said, _, _ = str(error).partition("\n")
        raise BadSample("damaged", f"its row group cannot be read: {said}") from None


def _failed_to_read(error: Exception) -> bool:
    """Whether the storage failed; of damaged content pyarrow also raises OSError, but without a number."""
    return isinstance(error, OSError) and error.errno is not None


def _columns(path: str, names: Sequence[str]) -> list[str]:
    """The columns that are read, of all `names`. Raises DataError if they hold no sample."""
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
