"""What counts as the same, as the rules of deduplication say it: the keys that a document has under each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urldefrag, urlsplit

import numpy as np
from datatrove.data import Document

from data_pipelines.corpus.buckets import COUNTED, ENTRY, key_hash
from data_pipelines.corpus.filter import END_OF_DOCUMENT
from data_pipelines.corpus.minhash import MinHash
from data_pipelines.corpus.picture_hash import perceptual_hash
from data_pipelines.corpus.rules import is_off
from data_pipelines.frame.document import BETWEEN_TEXTS, Node, image_bytes, images_of, nodes_of
from m4train.errors import BadSample, ConfigError
from m4train.processing.images import decode_image

CHOOSING = ("url", "image_set", "minhash")  # of the documents of a key, the newest is kept
COUNTING = ("image", "picture", "paragraph")  # what more documents have than the rule allows, is removed from all
_DIGITS = re.compile(r"\D")


@dataclass(frozen=True)
class DedupRules:
    """The rules that are on: `counts` how often something may occur."""

    choosing: tuple[str, ...]
    counts: Mapping[str, int]
    minhash: MinHash

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> DedupRules:
        """Raises ConfigError for a rule that is not known or cannot be."""
        for name in given:
            if name not in (*CHOOSING, *COUNTING):
                raise ConfigError(f"rules.{name} is not known; there are {', '.join((*CHOOSING, *COUNTING))}.")
        on = {name: value for name, value in given.items() if not is_off(value)}
        if not on:
            raise ConfigError(
                f"rules is empty, so nothing would be compared: name some of {', '.join((*CHOOSING, *COUNTING))}."
            )
        for name in COUNTING:
            if name in on and (not isinstance(on[name], int) or on[name] is True or on[name] < 1):
                raise ConfigError(
                    f"rules.{name}={on[name]!r} must say in how many documents it may be: 1 or more, or off."
                )
        for name in ("url", "image_set"):
            if on.get(name, True) is not True:
                raise ConfigError(f"rules.{name}={on[name]!r} must be true or off.")
        choosing = tuple(name for name in CHOOSING if name in on)
        return cls(choosing, {name: on[name] for name in COUNTING if name in on}, _minhash(on.get("minhash", True)))

    @property
    def kinds(self) -> dict[str, np.dtype]:
        """What is written of the keys of each rule."""
        return dict.fromkeys(self.choosing, ENTRY) | dict.fromkeys(self.counts, COUNTED)

    def keys(self, rule: str, document: Document) -> Iterator[int]:
        """The keys of a document under a rule: those of `paragraph` as often as they occur, others once."""
        if rule == "url":
            url = urldefrag(document.metadata.get("url") or "")[0]
            yield from [key_hash(url)] if url else []
        elif rule == "image_set":
            shown = sorted({str(node.get("sha256") or node.get("url")) for node in images_of(document)})
            yield from [key_hash("\0".join(shown))] if shown else []
        elif rule == "minhash":
            yield from self.minhash.keys(document.text.lower().split())
        elif rule == "paragraph":
            for node in nodes_of(document):
                if node["type"] == "text":
                    yield from (
                        key for part in node["text"].split(BETWEEN_TEXTS) for key in paragraph_keys(document, part)
                    )
        else:
            yield from {key for node in images_of(document) for key in image_keys(rule, document, node)}


def _minhash(given: Any) -> MinHash:
    if given is True:
        return MinHash()
    names = ("bands", "rows", "shingle", "seed")
    if not isinstance(given, Mapping) or any(
        name not in names or not isinstance(n, int) or n < 1 for name, n in given.items()
    ):
        raise ConfigError(
            f"rules.minhash={given!r} must be true, off, or whole numbers for some of {', '.join(names)}."
        )
    return MinHash(**given)


def image_keys(rule: str, document: Document, node: Node) -> list[int]:
    """`image`: its URL and its bytes; `picture`: what it looks like, if it can be decoded."""
    if rule == "image":
        return [key_hash(f"{name} {node[name]}") for name in ("url", "sha256") if node.get(name)]
    try:
        data = image_bytes(document, node)
        return [] if data is None else [key_hash(f"looks {perceptual_hash(decode_image(data))}")]
    except BadSample:
        return []


def paragraph_keys(document: Document, paragraph: str) -> list[int]:
    """The key of a paragraph in its domain; none if it is empty or the mark between documents."""
    text = " ".join(paragraph.split())
    if not text or text == END_OF_DOCUMENT:
        return []
    return [key_hash(f"{domain_of(document.metadata.get('url') or '')}\0{text}")]


@lru_cache(1 << 14)
def _registered(host: str) -> str:
    return _suffixes()(host).top_domain_under_public_suffix or host


@lru_cache(1)
def _suffixes() -> Any:
    import tldextract

    return tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())  # the list in the package: nothing is downloaded


def domain_of(url: str) -> str:
    """The domain that was registered, such as example.co.uk of www.example.co.uk; of an IP address that itself."""
    try:
        return _registered(urlsplit(url).hostname or "")
    except ValueError:
        return ""


def newest_first(document: Document) -> int:
    """Orders documents by date, the newest first; one without a date comes after all that have one.

    Raises ConfigError for a date that cannot be read: which document is newer would be a guess.
    """
    date = (document.metadata.get("source") or {}).get("date")
    if not date:
        return 0
    try:
        found = datetime.fromisoformat(str(date))
    except ValueError:
        digits = _DIGITS.sub("", str(date)).ljust(14, "0")  # 2023, 20230115, 20230115093000
        try:
            found = datetime.strptime(
                f"{digits[:4]}{_at_least_one(digits[4:6])}{_at_least_one(digits[6:8])}{digits[8:14]}", "%Y%m%d%H%M%S"
            )
        except ValueError:
            raise ConfigError(
                f"Document {document.id} ({document.metadata.get('url')}) has the date {date!r}, which is not one like "
                "2023-01-15T09:30:00Z or 20230115093000: correct it, so that the newest can be kept."
            ) from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=UTC)
    return -max(1, int(found.timestamp()))


def _at_least_one(digits: str) -> str:
    return digits if int(digits) else "01"
