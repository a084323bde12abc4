"""Hugging Face datasets in parquet: The Cauldron, FineVision, Docmatix (images and turns), OBELICS once its images are
fetched (parallel lists), and conversations with `messages` or `conversations`.

Parquet is read by row group, so the plan orders samples within windows of row groups, and each process keeps those of two
windows, as Arrow tables: a row becomes Python objects only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from m4train.config.packages import need
from m4train.data.documents.sample import Sample
from m4train.data.sources.base import Member, ScannedSample, StoredFiles
from m4train.data.sources.fields import CAPTIONS, PICTURES, RECORD_OPTIONS, TITLE, TURNS, Reading, asking, is_column
from m4train.data.sources.gallery import NUMBERED
from m4train.data.sources.pictures import Pictures
from m4train.data.sources.records import (
    Composed,
    compose,
    found_images,
    identity,
    image_member,
    kept_images,
    text_hash,
    unchanged,
)
from m4train.data.storage.files import FileReader, Range, is_remote
from m4train.data.storage.kept_blocks import KeptBlocks
from m4train.data.storage.remote_stream import RemoteStream
from m4train.errors import BadSample, DataError


class ParquetRows(StoredFiles):
    """One sample a row. A member's `offset` is its row group, `size` its row in it, `part` the number of the image."""

    name = "parquet"
    settings: Mapping[str, Any] = {"rules": 5}
    pictures = Pictures()
    honours = RECORD_OPTIONS

    def __init__(self, reading: Reading = Reading(), window: int = 1, pool: int = 0) -> None:  # noqa: B008 (frozen)
        self.reading = reading
        self.keep(window, pool)

    def keep(self, window: int, pool: int) -> None:
        """Prepares for samples drawn within `window` row groups and packed from a `pool`."""
        self._kept: KeptBlocks[Any] = KeptBlocks(window, pool)
        self._footers: dict[str, Any] = {}  # of remote files, by path
        self._places: dict[tuple[str, int], list[Range]] = {}  # of their row groups
        self.groups_read = 0

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"image_range": self.image_range, "settings": self.settings, "pictures": self.pictures}
        return (ParquetRows, (self.reading, self._kept.window, self._kept.pool), state)

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        number = 0
        for group, rows in enumerate(self.blocks(files, path)):
            try:
                table = self._group(files, path, group, whole=True)
            except BadSample as error:  # once for all its rows, which would each read it again
                bad = (error.reason, error.detail)
                yield from (ScannedSample(str(number + row), bad=bad) for row in range(rows))
            else:
                yield from (self._scan_row(files, path, table, str(number + row), group, row) for row in range(rows))
            number += rows

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return sum(self.blocks(files, path))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        return self._composed(files, path, members).sample

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        if not wanted:
            return []
        composed, found = self._composed(files, path, members), []
        for number in wanted:
            data = self._stored(files, path, composed.pictures[int(composed.sample.images[number])], number)
            found.append(unchanged(data, members[1 + number], f"image {number}"))
        return found

    def _composed(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Composed:
        text = members[0]
        content = _row(self._group(files, path, text.offset), text.size)
        composed = compose(content, self.reading, kept=kept_images(members, self.reading))
        if text_hash(composed.text) != text.hash:
            detail = f"row {text.size} of row group {text.offset} has other text than when it was indexed"
            raise BadSample("damaged", detail)
        if len(composed.sample.images) != len(members) - 1:
            found = f"{len(composed.sample.images)} images, but held {len(members) - 1} when indexed"
            raise BadSample("damaged", f"the row holds {found}")
        return composed

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        """The columns of its row group, if that is not kept and the file was read before."""
        group = members[0].offset
        return [] if path not in self._footers or (path, group) in self._kept else self._chunks(path, group)

    def _chunks(self, path: str, group: int) -> list[Range]:
        """Where the columns that are read lie in a row group of a remote file whose footer is known."""
        if (path, group) not in self._places:
            footer = self._footers[path]
            read = set(_columns(path, footer.schema.to_arrow_schema().names, self.reading))
            found = footer.row_group(group)
            columns = [found.column(number) for number in range(found.num_columns)]
            columns = [column for column in columns if column.path_in_schema.split(".")[0] in read]
            self._places[path, group] = [(path, _start(column), column.total_compressed_size) for column in columns]
        return self._places[path, group]

    def blocks(self, files: FileReader, path: str) -> list[int]:
        with _open(files, path) as file:
            metadata = file.metadata
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _scan_row(self, files: FileReader, path: str, table: Any, key: str, group: int, row: int) -> ScannedSample:
        named: tuple[str, ...] = ()
        try:
            composed = compose(_row(table, row), self.reading)
            named = self.pictures.files_of(path, [each for each in composed.pictures if isinstance(each, str)])
            found, lost = found_images(
                composed,
                self.reading,
                lambda value, n: self._image(files, path, value, n, group, row),
            )
            text = Member(group, row, text_hash(composed.text))
            sample = None if lost else composed.sample
            return ScannedSample(
                key, (text, *found), None, named, composed.unread() + lost, identity(composed.sample, found), sample
            )
        except BadSample as error:
            return ScannedSample(key, bad=(error.reason, error.detail), files=named)

    def _image(self, files: FileReader, path: str, picture: Any, number: int, group: int, row: int) -> Member:
        data = self._stored(files, path, picture, number)
        what = self.pictures.called(path, picture, number) if isinstance(picture, str) else ""
        return image_member(data, number, group, row, what)

    def _stored(self, files: FileReader, path: str, picture: Any, number: int) -> bytes:
        """The bytes of image `number` of a row, which holds or names it. Raises BadSample."""
        if isinstance(picture, bytes):
            return picture
        try:
            return self.pictures.stored(files, path, str(picture))[0]
        except BadSample as error:
            raise BadSample(error.reason, f"image {number}, which the row does not hold: {error.detail}") from None

    def _group(self, files: FileReader, path: str, group: int, whole: bool = False) -> Any:
        """The table of a row group, from those that are kept or from the file; `whole`: with the columns that are not read."""
        table = self._kept.get((path, group))
        if table is None or whole:
            if is_remote(path) and not whole:
                self._expect(files, path, group)
            with _open(files, path, self._footers.get(path)) as file:
                columns = _columns(path, file.schema_arrow.names, self.reading)
                read = table = file.read_row_group(group, columns=None if whole else columns)
                if whole:
                    read = table.select(columns)
            self.groups_read += 1
            self._kept.add((path, group), read, len(table))
        return table

    def _expect(self, files: FileReader, path: str, group: int) -> None:
        """Has the columns of a row group of a remote file at hand, from one request if they were not asked for before."""
        if path not in self._footers:
            with _open(files, path) as file:
                self._footers[path] = file.metadata
        chunks = self._chunks(path, group)
        if not all(map(files.holds, chunks)):
            files.expect(chunks)


def _start(column: Any) -> int:
    """The first byte of a column of a row group: its pages, or the dictionary before them."""
    first = column.dictionary_page_offset
    return int(first if first and first < column.data_page_offset else column.data_page_offset)


def _row(table: Any, row: int) -> dict[str, Any]:
    with _named_damage():
        return table.slice(row, 1).to_pylist()[0]


@contextmanager
def _open(files: FileReader, path: str, footer: Any = None) -> Iterator[Any]:
    """The open file, whose `footer` is read if it is not given. Raises DataError if it is not a parquet file, and BadSample if what is read of it is damaged."""
    need("pyarrow", "reading parquet")
    import pyarrow.parquet

    try:
        # What is read of a file whose footer is known is at hand, and a buffer would ask for more than that.
        stored: Any = path
        if is_remote(path):
            stored = files.open(path) if footer is None else RemoteStream(files, path)
        opened = pyarrow.parquet.ParquetFile(stored, metadata=footer, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        if _failed_to_read(error):
            raise
        raise DataError(
            f"{path} is not a readable parquet file ({_one_line(error)}): fetch or write it again."
        ) from None
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
        raise BadSample("damaged", f"its row group cannot be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip().rstrip(".")


def _failed_to_read(error: Exception) -> bool:
    """Whether the storage failed; of damaged content pyarrow also raises OSError, but without a number."""
    return isinstance(error, OSError) and error.errno is not None


def _columns(path: str, names: Sequence[str], reading: Reading) -> list[str]:
    """The columns that are read, of all `names`. Raises DataError if they hold no sample."""
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise DataError(f"{path} has two columns named {twice!r}, of which only one could be read: rename one.")
    texts = [reading.fields.get(name, name) for name in (*reversed(TURNS), *CAPTIONS, TITLE, *asking())]
    if not set(names) & set(texts):
        raise DataError(
            f"{path} has columns {list(names)} but none of {', '.join(texts)}: say which is which, as fields={{question: ..., answer: ...}}."
        )
    if "pdf" in names and not set(names) & {reading.fields.get(name, name) for name in PICTURES}:
        raise DataError(f"{path} holds its pages as pdf: render them to images first, or take the set's images.")
    return [name for name in names if is_column(name, reading) or NUMBERED.fullmatch(name)]
