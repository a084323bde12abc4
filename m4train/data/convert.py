"""Any source as canonical shards: the same samples, with the image bytes as they are stored.

A source is converted in chunks of samples, each into shards of its own, so that an interrupted conversion goes on with the
chunks that are missing, and several processes may share the work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m4train.data.documents.sample import Sample
from m4train.data.loading.quarantine import QuarantineEntry
from m4train.data.shards import ShardWriter
from m4train.data.source import Source
from m4train.data.sources.records import marked_literal
from m4train.errors import BadSample, DataError
from m4train.processing.images import read_image_info
from m4train.run_files import QUARANTINE

_DONE = ".done"  # folder of one file for each finished chunk
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}
_TOGETHER = 64  # samples asked of an object store at once


def convert(
    source: Source,
    folder: str | Path,
    max_bytes: int = 1 << 30,
    max_samples: int = 10_000,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Writes every sample of `source` to canonical shards `folder/NAME-CHUNK-NUMBER.tar`; what is there already is kept.

    Keys are made of the shard's name and the key there, with what a key may not hold replaced, and if that makes two
    alike the number of the sample. Samples that cannot be
    read are named in `folder/quarantine.jsonl`. Returns the number of samples `written`, and how many were left out for
    each reason. `progress(done, total)` counts samples. Raises DataError if `folder` holds another conversion.
    """
    chunks = [_Chunk(source, Path(folder), n, max_bytes, max_samples) for n in range(-(-len(source) // max_samples))]
    (Path(folder) / _DONE).mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    done = 0
    for chunk, found in _each(chunks, workers):
        counts.update(found)
        done += len(chunk.samples)
        if progress is not None:
            progress(done, len(source))
    _write_quarantine(Path(folder))
    return dict(counts)


def canonical(source: Source, number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The canonical JSON of a sample and its stored images by member name. Raises BadSample."""
    sample, images = source.read(number), source.stored_images(number)
    names = [f"{place}.{image_extension(read_image_info(data).format)}" for place, data in enumerate(images)]
    return marked_literal(_content(sample, names, images)), dict(zip(names, images))


@dataclass(frozen=True)
class _Chunk:
    """Consecutive samples of a source, written to shards of their own."""

    source: Source
    folder: Path
    number: int
    max_bytes: int
    max_samples: int

    @property
    def samples(self) -> range:
        return range(self.number * self.max_samples, min((self.number + 1) * self.max_samples, len(self.source)))

    @property
    def prefix(self) -> str:
        return f"{self.source.name.replace('/', '-')}-{self.number:05d}"

    def convert(self) -> dict[str, int]:
        """Writes the chunk, if that was not done before; returns its counts."""
        marker = self.folder / _DONE / f"{self.prefix}.json"
        made_from = [self.source.index.digest(), self.max_bytes, self.max_samples]
        if marker.exists():
            stored = json.loads(marker.read_text())
            if stored["made_from"] != made_from:
                raise DataError(
                    f"{self.folder} holds a conversion of another {self.source.name!r}: choose another folder, or remove it."
                )
            return stored["counts"]
        for left in self.folder.glob(f".{self.prefix}-*.tmp"):
            left.unlink()
        counts: Counter[str] = Counter()
        stems = Counter(Path(shard.shard).stem for shard in self.source.index.shards)
        bad = []
        with ShardWriter(self.folder, self.prefix, self.max_bytes, self.max_samples) as writer:
            for number in self.samples:
                if number % _TOGETHER == self.samples.start % _TOGETHER:
                    self.source.expect(range(number, min(number + _TOGETHER, self.samples.stop)))
                entry = self._write(writer, number, stems)
                counts["written" if entry is None else entry.reason] += 1
                bad += [] if entry is None else [asdict(entry)]
        temporary = marker.with_suffix(".tmp")
        temporary.write_text(json.dumps({"made_from": made_from, "counts": counts, "bad": bad}))
        os.replace(temporary, marker)
        return dict(counts)

    def _write(self, writer: ShardWriter, number: int, stems: Mapping[str, int]) -> QuarantineEntry | None:
        where = self.source.locate(number)
        key, shard, stem = where.key, where.shard, Path(where.shard.shard).stem
        try:
            content, images = canonical(self.source, number)
        except BadSample as error:
            return QuarantineEntry(0, -1, self.source.name, key, shard.shard, error.reason, error.detail)
        if stems[stem] > 1:
            stem = f"{self.source.index.shard_number(number):05d}-{stem}"
        new = f"{stem}-{key}".replace(".", "_").replace("/", "_").lstrip("_")
        while new in writer:
            new = f"{new}-{number}"
        writer.write(new, content, images)
        return None


def _each(chunks: list[_Chunk], workers: int) -> Iterator[tuple[_Chunk, dict[str, int]]]:
    """Every chunk with its counts, as they are finished."""
    if min(workers, len(chunks)) < 2:
        yield from ((chunk, chunk.convert()) for chunk in chunks)
        return
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=multiprocessing.get_context("forkserver")) as pool:
        running = {pool.submit(chunk.convert): chunk for chunk in chunks}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write_quarantine(folder: Path) -> None:
    entries = [
        entry for path in sorted((folder / _DONE).glob("*.json")) for entry in json.loads(path.read_text())["bad"]
    ]
    (folder / QUARANTINE).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _content(sample: Sample, names: list[str], images: list[bytes]) -> dict[str, Any]:
    """The sample's JSON with its images renamed and their sizes filled in."""
    for item, name, data in zip(sample.image_items(), names, images, strict=True):
        info = read_image_info(data)
        item |= {"image": name, "width": info.width, "height": info.height}
    body: dict[str, Any] = {"items": sample.items} if sample.items is not None else {"messages": sample.messages}
    body |= {"weight": sample.weight} if sample.weight != 1 else {}
    optional = {"scores": sample.scores, "references": list(sample.references)}
    return body | {"source": sample.source} | {name: value for name, value in optional.items() if value}


def image_extension(kind: str) -> str:
    """The ending of the name of an image of this format, as Pillow calls it."""
    return _EXTENSIONS.get(kind, kind.lower())
