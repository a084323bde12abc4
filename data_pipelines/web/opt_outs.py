"""What sites and pages say about being used for training: robots meta and headers, and TDM reservation (W3C community report)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

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
