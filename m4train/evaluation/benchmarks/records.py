"""The records of a benchmark: rows of parquet, objects of JSON and JSONL, samples of canonical shards, in stored order."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from m4train.config.packages import need
from m4train.errors import ConfigError, DataError
from m4train.processing.images import to_rgb
from m4train.processing.inputs import from_base64

Record = dict[str, Any]
_FORMS = (".parquet", ".json", ".jsonl", ".tar")


def place_of(data: Path, name: str) -> Path:
    """Where the data of a benchmark is: data/NAME, or data/NAME.ENDING."""
    found = [path for path in (data / name, *sorted(data.glob(f"{name}.*"))) if path.exists()]
    if not found:
        raise ConfigError(f"{data} holds no folder or file {name}: download the benchmark to {data / name}.")
    return found[0]


def files_of(place: Path) -> list[Path]:
    """The files of a benchmark: the one named, those of a folder that match a pattern such as `*/validation-*.parquet` behind it, or
    all of a folder that have a known ending. Raises ConfigError."""
    fixed = list(takewhile(lambda part: "*" not in part, place.parts))
    if len(fixed) < len(place.parts):
        wanted = str(Path(*place.parts[len(fixed) :]))
        folder = Path(*fixed)
        found = sorted(path for path in folder.rglob("*") if fnmatch(str(path.relative_to(folder)), wanted))
    else:
        found = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.suffix in _FORMS)
    if not found or found[0].suffix not in _FORMS:
        raise ConfigError(f"{place} holds no {', '.join(_FORMS)} file: download the benchmark there.")
    return found


def records(place: Path) -> Iterator[tuple[Record, Path]]:
    """Every record, with the folder that its pictures are named from. Raises DataError."""
    for path in files_of(place):
        try:
            for record in _READERS[path.suffix](path):
                if not isinstance(record, dict):
                    raise ValueError(f"{str(record)[:40]!r} is not a record")
                yield record, path.parent
        except (ValueError, OSError, tarfile.TarError) as error:
            raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}): download it again.") from error


def count_records(place: Path) -> int:
    """How many records there are."""
    if not all(path.suffix == ".parquet" for path in files_of(place)):
        return sum(1 for _ in records(place))
    need("pyarrow", "reading parquet")
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in files_of(place))


def _parquet(path: Path) -> Iterator[Record]:
    need("pyarrow", "reading parquet")
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _json(path: Path) -> Iterator[Record]:
    """A list, or an object that holds one under `data`, `questions` or `annotations`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(found, dict):
        found = next((found[key] for key in ("data", "questions", "annotations") if key in found), [found])
    yield from found


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _tar(path: Path) -> Iterator[Record]:
    """Canonical shards: the fields of KEY.json, under `image` its stored pictures, and of a conversation its last question and answer."""
    held: dict[str, Record] = {}
    with tarfile.open(path) as file:
        for member in file:
            key, _, ending = member.name.partition(".")
            data = file.extractfile(member)
            if data is None:
                continue
            record = held.setdefault(key, {"key": key, "image": []})
            if ending == "json":
                record.update(json.loads(data.read()))
            else:
                record["image"].append({"bytes": data.read()})
    yield from (_last_turn(record) for record in held.values())


def _last_turn(record: Record) -> Record:
    """`question` and `references` as the messages of a conversation give them, if its own fields do not."""
    said = record.get("messages")
    if not isinstance(said, list) or len(said) < 2:
        return record
    asked, answer = (
        message["content"]
        if isinstance(message["content"], str)
        else "".join(item.get("text", "") for item in message["content"])
        for message in said[-2:]
    )
    return {"question": asked, "references": [answer], **record}


_READERS = {".parquet": _parquet, ".json": _json, ".jsonl": _jsonl, ".tar": _tar}


def pictures(value: Any, folder: Path, key: str) -> list[Image.Image]:
    """The images of a field: bytes, a mapping with `bytes` or `path`, a path, base64, or a list of those. Raises DataError."""
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [image for each in value for image in pictures(each, folder, key)]
    try:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") else value["path"]
        if isinstance(value, str):
            path = folder / value if len(value) < 1024 else None
            value = path.read_bytes() if path is not None and path.is_file() else from_base64(value)
        return [to_rgb(Image.open(io.BytesIO(value)))]
    except Exception as error:  # decoders raise their own types
        raise DataError(f"sample {key}: its picture cannot be read ({error}): download the benchmark again.") from error
