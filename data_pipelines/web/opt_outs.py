"""What sites, pages and images say about being used for training: robots meta and headers, TDM reservation (W3C community report), the
assertions of C2PA in image files, and lists of URLs that somebody keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import xxhash

from data_pipelines.frame.store import open_lines
from m4train.errors import ConfigError

NO_AI, NO_IMAGE_AI, RESERVED = "noai", "noimageai", "tdm-reservation"
_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def in_robots(value: str, agent: str) -> set[str]:
    """`noai` and `noimageai` of an X-Robots-Tag or robots meta that hold for `agent`; `name: directive` is for one agent alone."""
    found = set()
    holds = True
    for part in value.lower().split(","):
        name, colon, directive = (piece.strip() for piece in part.partition(":"))
        if colon and name not in _WITH_VALUES:
            holds = name in ("*", agent.lower())
        else:
            directive = name
        if holds and directive in (NO_AI, NO_IMAGE_AI):
            found.add(directive)
    return found


def reserved(value: Any) -> bool:
    """Whether a `tdm-reservation` says 1."""
    return str(value).strip() == "1"


def of_headers(headers: Iterable[tuple[str, str]], agent: str) -> set[str]:
    """What the headers of a response ask for."""
    found = set()
    for name, value in headers:
        if name.lower() == "x-robots-tag":
            found |= in_robots(value, agent)
        elif name.lower() == "tdm-reservation" and reserved(value):
            found.add(RESERVED)
    return found


def of_page(metadata: dict[str, Any], agent: str) -> set[str]:
    """What a page asks for, in its headers (from `warc`) and its meta elements (from `extract`)."""
    meta = metadata.get("meta") or {}
    found = of_headers((metadata.get("headers") or {}).items(), agent)
    for name in ("robots", agent.lower()):
        found |= in_robots(meta.get(name, ""), agent)
    if reserved(meta.get("tdm-reservation", "")):
        found.add(RESERVED)
    return found


class Reservations:
    """The rules of `/.well-known/tdmrep.json`: the first whose location fits a path holds."""

    def __init__(self, values: Any) -> None:
        rules = values if isinstance(values, list) else []
        self._rules = [
            (_pattern(rule["location"]), reserved(rule.get("tdm-reservation", 0)))
            for rule in rules
            if isinstance(rule, dict) and isinstance(rule.get("location"), str)
        ]

    def __contains__(self, path: str) -> bool:
        return next((holds for pattern, holds in self._rules if pattern.match(path)), False)


def _pattern(location: str) -> re.Pattern[str]:
    """A location as in robots.txt: a beginning, with * for anything, and $ for the end."""
    end = location.endswith("$")
    parts = (location[:-1] if end else location).split("*")
    return re.compile(".*".join(map(re.escape, parts)) + ("$" if end else ""))


# Entries of the assertion `c2pa.training-mining`, or cawg.training-mining, as CBOR or JSON hold them: the use up to the next entry
_ASSERTION = b".training-mining"
_NOT_ALLOWED = re.compile(
    rb"(?:c2pa|cawg)\.(?:ai_training|ai_generative_training|data_mining)"
    rb"(?:(?!\.ai_|\.data_mining).){0,400}?use.{1,8}?(?:notAllowed|constrained)",
    re.DOTALL,
)


def in_content(content: bytes) -> bool:
    """Whether the Content Credentials (C2PA) in an image file do not allow training or mining, or only under conditions.

    That it is said counts, not who signed it; a manifest that is compressed is not looked into.
    """
    return _ASSERTION in content and _NOT_ALLOWED.search(content) is not None


class Listed:
    """The URLs and domains of lists: files with one a line, packed by gzip or not; # begins a comment. 8 bytes each."""

    def __init__(self, files: Iterable[str]) -> None:
        """Raises ConfigError for a file that is not there."""
        self._hashes = np.unique(np.fromiter((_hash(line) for path in files for line in _lines(path)), np.uint64))

    def __contains__(self, url: str) -> bool:
        if not len(self._hashes):
            return False
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            host = ""
        parts = host.split(".")
        named = [url, *(".".join(parts[n:]) for n in range(len(parts)))]
        return any(self._holds(_hash(name)) for name in named if name)

    def _holds(self, wanted: int) -> bool:
        place = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        return place < len(self._hashes) and int(self._hashes[place]) == wanted


def _lines(path: str) -> Iterator[str]:
    if not Path(path).is_file():
        raise ConfigError(
            f"fetch.refused names {path}, which is not a file: give lists of URLs and domains, one a line."
        )
    for line in open_lines(Path(path)):
        named = line.split(" #")[0].strip() if not line.startswith("#") else ""
        if named:
            yield named if "://" in named else named.lower().strip(".")


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))
