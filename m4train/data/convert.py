"""Any source as canonical shards: the same samples, with the image bytes as they are stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from m4train.data.sample import Sample
from m4train.data.shards import ShardWriter
from m4train.data.source import Source
from m4train.errors import BadSample
from m4train.processing.images import read_image_info

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}


def convert(source: Source, folder: str | Path, max_bytes: int = 1 << 30, max_samples: int = 10_000) -> dict[str, int]:
    """Writes every sample of `source` to canonical shards in `folder`.

    Keys are made of the shard's name and the key there, with what a key may not hold replaced. Returns the number of
    samples `written`, and how many were left out for each reason.
    """
    counts: Counter[str] = Counter()
    with ShardWriter(folder, source.name, max_bytes, max_samples) as writer:
        for number in range(len(source)):
            try:
                sample, images = source.read(number), source.stored_images(number)
                names = [f"{place}.{_extension(data)}" for place, data in enumerate(images)]
                content = _content(sample, names, images)
            except BadSample as error:
                counts[error.reason] += 1
                continue
            shard, local = source.index.locate(number)
            key = f"{Path(shard.shard).stem}-{shard.key(local)}".replace(".", "_").replace("/", "_").lstrip("_")
            writer.write(key, content, dict(zip(names, images)))
            counts["written"] += 1
    return dict(counts)


def _content(sample: Sample, names: list[str], images: list[bytes]) -> dict[str, Any]:
    """The sample's JSON with its images renamed and their sizes filled in."""
    for item, name, data in zip(sample.image_items(), names, images, strict=True):
        info = read_image_info(data)
        item |= {"image": name, "width": info.width, "height": info.height}
    body: dict[str, Any] = {"items": sample.items} if sample.items is not None else {"messages": sample.messages}
    return body | {"source": sample.source} | ({"scores": sample.scores} if sample.scores else {})


def _extension(data: bytes) -> str:
    kind = read_image_info(data).format
    return _EXTENSIONS.get(kind, kind.lower())
