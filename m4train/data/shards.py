"""Writing shards, and finding them: plain tar files that webdataset and Energon read too."""

from __future__ import annotations

import copy
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from tarfile import RECORDSIZE
from types import TracebackType
from typing import IO, Any

from m4train.data.documents.sample import dump_sample, sample_from_dict
from m4train.data.sources.detect import extension, way_out
from m4train.data.sources.folders import check_splits, counts_as_shard, look_into, splits_in
from m4train.data.sources.picture_folder import PictureFolder
from m4train.data.storage.files import find_files, is_there
from m4train.errors import BadSample, DataError

_LOG = logging.getLogger(__name__)
_BLOCK = 512


def expand_shards(pattern: str, form: str = "auto") -> list[str]:
    """The shards that a path, a glob or a brace pattern (`train-{0000..0042}.tar`) names, sorted within each glob.

    A folder stands for the records or shards of the format `form` in it, or is itself one of pictures with texts.
    Raises DataError if the pattern, or one of the names it expands to, matches no file, and for a folder that may be read in
    several ways.
    """
    import braceexpand

    shards: list[str] = []
    # What is there under the very name is meant by it, brackets and braces or not.
    for name in [pattern] if is_there(pattern) else braceexpand.braceexpand(pattern):
        folder = os.path.expanduser(name)
        if os.path.isdir(folder):
            found = _in_folder(folder, form)
        else:
            found = [path for path in find_files(name) if counts_as_shard(path)]
            splits = splits_in("", found)
            if len(splits) > 1:
                _LOG.warning("%r matches files of several splits: %s", name, ", ".join(sorted(splits)))
        if not found:
            there = look_into(folder).others if os.path.isdir(folder) else []
            advice = way_out(there)
            also = f", which holds files like {os.path.basename(there[0])}" if advice else ""
            raise DataError(
                f"No shard matches {name!r} (from {pattern!r}){also}: {advice or 'write it first'} or correct the source's path."
            )
        shards.extend(found)
    if len(set(shards)) != len(shards):
        raise DataError(f"The pattern {pattern!r} names some shards twice: its samples would be repeated.")
    return shards


def _in_folder(folder: str, form: str) -> list[str]:
    """What a folder stands for: the shards of that format, or what it holds. Raises DataError."""
    holds = look_into(folder)
    if form == PictureFolder.name:
        found = [os.path.normpath(folder)] if holds.pictures else []
    else:
        found = holds.shards() if form == "auto" else holds.of_kind(form)
    check_splits(holds, found)
    kinds = sorted({extension(path) for path in found}) if not os.path.isdir(found[0] if found else "") else []
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds files of several kinds ({', '.join(kinds)}): name those that are meant, as *{kinds[0]}."
        )
    left = [os.path.relpath(path, folder) for path in holds.passed_over(found)]
    if found and left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        _LOG.warning("of the files in %s these are not read: %s%s", folder, ", ".join(left[:5]), more)
    return found


class ShardWriter:
    """Writes samples to `folder/PREFIX-000000.tar`, `-000001` ... with the same bytes for the same samples.

    A shard is closed when the next sample would take it above `max_bytes` (tar bytes) or `max_samples`. Each is written
    under a temporary name, synced and renamed, so that a shard with a final name is complete. Use it as a context
    manager; leaving by an exception keeps the finished shards and removes the one being written.
    """

    def __init__(
        self, folder: str | Path, prefix: str = "shard", max_bytes: int = 1 << 30, max_samples: int = 10_000
    ) -> None:
        self.folder = Path(folder)
        self.prefix = prefix
        self.max_bytes = max_bytes
        self.max_samples = max_samples
        self.paths: list[Path] = []
        self._stream: IO[bytes] | None = None
        self._tar: Any = None
        self._bytes = 0
        self._samples = 0
        self._keys: set[str] = set()

    def write(self, key: str, sample: Mapping[str, Any], images: Mapping[str, bytes] | None = None) -> None:
        """Adds one sample: its JSON object and its image bytes by member name (`{"0.jpg": ...}`). Checksums are added.

        Raises DataError for a key with a dot, a repeated key, a sample that would not be read back, or an image that
        is missing, unused or misnamed.
        """
        images = dict(images or {})
        self._check(key, sample, images)
        members = {name: bytes(data) for name, data in images.items()}
        members["json"] = dump_sample(key, _with_checksums(sample, images))
        size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in members.values())
        if self._samples and (self._samples >= self.max_samples or self._bytes + size > self.max_bytes):
            self._finish()
        if self._tar is None:
            self._start()
        self._tar.write({"__key__": key, **members})
        self._keys.add(key)
        self._bytes += size
        self._samples += 1

    def __contains__(self, key: str) -> bool:
        """Whether a sample with this key was written."""
        return key in self._keys

    def _check(self, key: str, sample: Mapping[str, Any], images: Mapping[str, bytes]) -> None:
        if not key or "." in key or key.startswith("_") or key.strip("/") != key:
            raise DataError(f"Sample key {key!r} must be non-empty, without dots, and not start with '_' or '/'.")
        if key in self._keys:
            raise DataError(f"Sample key {key!r} was already written: keys must be unique.")
        try:
            names = sample_from_dict(dict(sample)).images
        except BadSample as error:
            raise DataError(f"Sample {key!r} would not be readable: {error.detail}.") from None
        if set(names) != set(images):
            raise DataError(f"Sample {key!r} names images {sorted(set(names))} but was given {sorted(images)}.")
        for name in images:
            if "." not in name or "/" in name or name == "json" or name.startswith("_"):
                raise DataError(f"Sample {key!r} has an image named {name!r}: use NUMBER.FORMAT, such as 0.jpg.")

    def _start(self) -> None:
        import webdataset

        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / f"{self.prefix}-{len(self.paths):06d}.tar"
        self._temporary = self.folder / f".{self._path.name}.{os.getpid()}.tmp"
        self._stream = open(self._temporary, "wb")  # noqa: SIM115 (held over many calls)
        self._tar = webdataset.TarWriter(self._stream, encoder=False, compress=False, mtime=0)
        self._bytes = self._samples = 0

    def _finish(self) -> None:
        assert self._stream is not None
        end = self._tar.tarstream.offset
        self._tar.close()
        # Not filled up to a multiple of the record size as other tools do, so that missing samples show: see tarfiles.
        end += _BLOCK * (2 if (end + 2 * _BLOCK) % RECORDSIZE else 3)
        self._stream.truncate(end)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._temporary, self._path)
        self.paths.append(self._path)
        self._stream = self._tar = None

    def close(self) -> None:
        """Finishes the shard being written."""
        if self._tar is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._stream is not None:
            self._tar.close()
            self._stream.close()
            os.unlink(self._temporary)
            self._stream = self._tar = None


def _with_checksums(sample: Mapping[str, Any], images: Mapping[str, bytes]) -> dict[str, Any]:
    """The sample's JSON with the crc32 of each image next to its name."""
    data = copy.deepcopy(dict(sample))
    data.pop("checksum", None)
    contents = [data.get("items", [])] + [message["content"] for message in data.get("messages", [])]
    for item in (item for content in contents if isinstance(content, list) for item in content):
        if item.get("image") is not None:
            item["crc32"] = zlib.crc32(images[item["image"]])
    return data
