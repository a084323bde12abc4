"""The output of img2dataset in its webdataset form: `00000.tar` with KEY.jpg, KEY.txt and KEY.json, whose `url` says whose image it is."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

from m4train.errors import DataError

_TEXTS = ("json", "txt")


def images_of_shard(path: str) -> Iterator[tuple[str, int, int]]:
    """URL, first byte and number of bytes of every image that was downloaded. Raises DataError for another kind of file."""
    try:
        with tarfile.open(path, "r:") as tar:
            key, image, url = "", None, None
            for member in tar:
                name, _, kind = member.name.partition(".")
                if name != key:
                    yield from _complete(url, image)
                    key, image, url = name, None, None
                if kind == "json":
                    file = tar.extractfile(member)
                    url = _url(json.loads(file.read()) if file else None)
                elif kind not in _TEXTS:
                    image = (member.offset_data, member.size)
            yield from _complete(url, image)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is not a tar file of img2dataset ({error}): give resolve.img2dataset its *.tar files."
        ) from None


def read_member(path: str, offset: int, length: int) -> bytes:
    """The bytes of an image."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _url(values: Any) -> str | None:
    if not isinstance(values, dict) or values.get("status", "success") != "success":
        return None
    return values.get("url") if isinstance(values.get("url"), str) else None


def _complete(url: str | None, image: tuple[int, int] | None) -> Iterator[tuple[str, int, int]]:
    if url and image:
        yield url, *image
