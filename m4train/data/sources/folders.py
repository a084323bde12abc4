"""What a folder stands for: the records or shards in it, or its pictures with what is said of each next to it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from m4train.data.sources.csv_records import CsvRecords
from m4train.data.sources.detect import FORMATS_BY_EXTENSION, extension, is_shard
from m4train.data.sources.fields import Reading, split_of
from m4train.data.sources.json_records import JsonRecords
from m4train.data.sources.picture_folder import ABOUT, SAID
from m4train.data.sources.record_files import is_metadata, is_picture, walk_folder
from m4train.data.sources.records import has_form
from m4train.data.sources.tarfiles import is_junk
from m4train.data.storage.files import FileReader
from m4train.errors import BadSample, DataError

_SIDECARS = (".index", ".tokens", ".catalogue", ".tombstones", ".lock")  # an index next to its shard is not a shard


@dataclass(frozen=True)
class Folder:
    """The files of a folder, in any depth, by what they may be. Paths begin with the folder's."""

    path: str
    pictures: list[str]
    said: list[str]  # texts and JSON files that have the name of a picture next to them
    metadata: list[str]  # tables and records that describe the pictures next to them, as of Hugging Face's imagefolder
    records: list[str]  # all other shards
    others: list[str]  # what is neither a picture nor a shard

    def of_kind(self, form: str) -> list[str]:
        """The shards that a folder holds of a format that is given. Raises DataError if they are texts of pictures."""
        wanted = form if form in FORMATS_BY_EXTENSION.values() else None  # in tars
        fits = lambda path: FORMATS_BY_EXTENSION[extension(path)] == wanted
        found = [*filter(fits, self.metadata)] or [*filter(fits, self.records)]
        if not found and form == "json" and any(extension(path) == ".json" for path in self.said):
            raise DataError(
                f"{self.path} holds pictures with a JSON file of the same name next to each: set format=picture_folder."
            )
        return found

    def shards(self) -> list[str]:
        """What the folder stands for if no format is given. Raises DataError if it may be read in two ways."""
        records = self.records
        if self.pictures:
            records = [path for path in records if _is_readable(path)]
        tables = self.metadata or records
        if self.pictures and self.said and tables:
            names = ", ".join(os.path.relpath(path, self.path) for path in tables[:3])
            raise DataError(
                f"{self.path} may be read as a folder of pictures ({len(self.said)} texts of the same names are next to them) or "
                f"as the records in {names}: set format=picture_folder, or name the file of records in path."
            )
        if self.pictures and not tables:
            return [os.path.normpath(self.path)]
        return tables

    def passed_over(self, taken: Sequence[str]) -> list[str]:
        """The files that may hold samples and are not among those `taken`."""
        return [path for path in (*self.metadata, *self.records) if path not in taken]


def look_into(folder: str) -> Folder:
    """What a folder holds."""
    files = [os.path.join(place, name) for place, _, names in walk_folder(folder) for name in names]
    pictures = [path for path in files if is_picture(path)]
    stems = {os.path.splitext(path)[0] for path in pictures}
    said = [path for path in files if path.lower().endswith(SAID) and os.path.splitext(path)[0] in stems]
    kept = set(said)
    tars = {os.path.splitext(path)[0] for path in files if extension(path) in (".tar", ".tgz")}
    shards = [path for path in files if is_shard(path) and counts_as_shard(path) and path not in kept]
    metadata = [path for path in shards if is_metadata(path)]
    records = [path for path in shards if path not in metadata and not _is_about(path, tars)]
    known = {*pictures, *said, *shards}
    return Folder(folder, pictures, said, metadata, records, [path for path in files if path not in known])


def counts_as_shard(path: str) -> bool:
    """Whether a file may be a shard, going by its name alone: neither an index nor what desktops leave."""
    return not (path.endswith(_SIDECARS) or is_junk(os.path.basename(path)))


def _is_about(path: str, tars: set[str]) -> bool:
    """Whether a file says something about a dataset: by its name, or as img2dataset's parquet next to a tar or folder."""
    stem = os.path.splitext(path)[0]
    described = stem in tars or os.path.isdir(stem)
    return ABOUT.fullmatch(os.path.basename(path)) is not None or (described and path.endswith((".parquet", ".json")))


def _is_readable(path: str) -> bool:
    """Whether a file holds samples: shards do, JSON and tables if the first record has a form that is known."""
    kinds = {"json": JsonRecords, "csv": CsvRecords}
    kind = kinds.get(FORMATS_BY_EXTENSION[extension(path)] or "")
    if kind is None:
        return True
    files, form = FileReader(), kind()
    try:
        raw = next((raw for _, raw in islice(form.records(files, path), 1)), None)
        return isinstance(raw, bytes) and has_form(form.parse(files, path, raw), Reading())
    except BadSample:
        return False


def splits_in(root: str, paths: Sequence[str]) -> Counter[str]:
    """How many of these files below `root` belong to each split of a dataset, by the names of their folders or their own."""
    found: Counter[str] = Counter()
    for path in paths:
        parts = os.path.relpath(path, root).split(os.sep) if root else [os.path.basename(path)]
        split = next((split for split in map(split_of, parts) if split is not None), None)
        if split is not None:
            found[split] += 1
    return found


def check_splits(folder: Folder, taken: Sequence[str]) -> None:
    """Raises DataError if what is taken of a folder are several splits of a dataset."""
    found = splits_in(folder.path, folder.pictures if taken == [os.path.normpath(folder.path)] else taken)
    if len(found) > 1:
        counted = ", ".join(f"{name}: {count} files" for name, count in sorted(found.items()))
        raise DataError(
            f"{folder.path} holds several splits of a dataset ({counted}), which would all be used as one: name one of them in "
            "path, as FOLDER/train or FOLDER/train-*, and the held-out one under data.validation."
        )
