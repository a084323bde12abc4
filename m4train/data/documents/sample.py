"""The sample on disk: one JSON object, and the original bytes of its images next to it.

A document holds `items` in reading order, `{"text": ...}` and `{"image": "0.jpg", "width":, "height":, "alt":}`; a
conversation holds `messages`, each a role and a list of the same items (or one string), and how much it is learned as
its `weight` if that is not 1. `source` says where the sample comes from, `scores` what filters thought of it,
`references` the answers that evaluation counts as right. Images are named by the members that hold them.

Samples written by this package also hold checksums, so that damage is not taken for content: `crc32` of each image next to its
name, and as the last field `checksum`, the crc32 of the key, a zero byte, and the JSON before that field.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from m4train.data.documents.learning import weight_of
from m4train.errors import BadSample

ROLES = ("system", "user", "assistant", "tool")
MAX_ITEMS = 50_000  # texts, images or messages of one sample; real ones have some hundred
_CHECKSUM = re.compile(rb',"checksum":([0-9]{1,10})\}$')


@dataclass(frozen=True)
class Sample:
    """One parsed sample: either `items` or `messages` is set, `images` names its images in reading order."""

    items: list[dict[str, Any]] | None = None
    messages: list[dict[str, Any]] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0  # how much a document is learnt; messages have each their own
    references: tuple[str, ...] = ()  # answers that evaluation counts as right, instead of the last message's text

    @property
    def images(self) -> list[str]:
        return [item["image"] for item in self.image_items()]

    def image_items(self) -> list[dict[str, Any]]:
        """The items that are images, in reading order."""
        return [item for item in self.all_items() if "image" in item]

    def all_items(self) -> Iterator[dict[str, Any]]:
        """The items of the document, or of every message, in reading order."""
        if self.items is not None:
            yield from self.items
        for message in self.messages or ():
            yield from message["content"]


def json_value(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError, also for a key that an object has twice: one of its values would be lost."""
    return json.loads(text, object_pairs_hook=_object)


@lru_cache(4)
def shared_json(raw: bytes) -> Any:
    """As `json_value`, once for bytes that are asked for several times in a row; nobody may change what it gives."""
    return json_value(raw)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return found


def dump_sample(key: str, data: dict[str, Any]) -> bytes:
    """The JSON of a sample as it is stored, with its checksum."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()[:-1]
    return body + b',"checksum":%d}' % _checksum(key, body)


def _checksum(key: str, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(key.encode() + b"\0"))


def parse_sample(raw: bytes, key: str | None = None) -> Sample:
    """Reads the JSON of a sample, and if its key is given compares its checksum, if it has one.

    Raises BadSample with reason `bad_json`, or `damaged` if the checksum does not fit.
    """
    checksum = _CHECKSUM.search(raw) if key is not None else None
    if checksum is not None and int(checksum[1]) != _checksum(str(key), raw[: checksum.start()]):
        raise BadSample("damaged", f"the JSON of {key!r} does not fit its checksum: bytes were changed or moved")
    try:
        data = shared_json(raw)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not a JSON object in UTF-8: {error}") from None
    return sample_from_dict(data)


def sample_from_dict(data: Any) -> Sample:
    """Checks the parsed JSON of a sample; raises BadSample as `parse_sample` does."""
    if not isinstance(data, dict):
        raise BadSample("bad_json", f"a {type(data).__name__} where an object is expected")
    if ("items" in data) == ("messages" in data):
        raise BadSample("bad_json", "must hold either `items` (a document) or `messages` (a conversation)")
    source, scores = data.get("source") or {}, data.get("scores") or {}
    if isinstance(source, str):
        source = {"dataset": source}
    if not isinstance(source, dict) or not isinstance(scores, dict):
        raise BadSample("bad_json", "`source` and `scores` must be objects")
    factor, _ = weight_of(data, "a record")
    if "items" in data:
        factor *= _items_weight(data["items"])
        return Sample(items=_items(data["items"], "items"), source=source, scores=scores, weight=factor)
    references = data.get("references") or []
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise BadSample("bad_json", "`references` must be a list of strings, the answers that count as right")
    messages = _messages(data["messages"], factor)
    return Sample(messages=messages, source=source, scores=scores, references=tuple(references))


def _messages(value: Any, factor: float) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadSample("bad_json", "`messages` must be a list with at least one message")
    _check_count(value, "messages")
    messages: list[dict[str, Any]] = []
    count = 0
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadSample("bad_json", f"{where} must be an object whose `role` is one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"text": content}]
        checked = {"role": message["role"], "content": _items(content, f"{where}.content")}
        weight = weight_of(message)[0] * _items_weight(content) * factor
        messages.append(checked if weight == 1 else checked | {"weight": weight})
        count += len(checked["content"])
        if count > MAX_ITEMS:
            raise BadSample("too_many_items", f"its messages hold more than {MAX_ITEMS} items")
    return messages


def _items_weight(items: Any) -> float:
    """How much the texts among some items are learnt. Raises BadSample `bad_weight` if it is not the same for all."""
    texts = [item for item in items if isinstance(item, dict) and "text" in item] if isinstance(items, list) else []
    weights = {weight_of(item, "an item")[0] for item in texts}
    if len(weights) > 1:
        detail = (
            "the items of a turn or document have different weights: give each its own turn, or all the same weight"
        )
        raise BadSample("bad_weight", detail)
    return weights.pop() if weights else 1.0


def _items(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadSample("bad_json", f"`{where}` must be a list with at least one item")
    _check_count(value, where)
    return [_item(item, f"{where}[{number}]") for number, item in enumerate(value)]


def _check_count(value: list[Any], where: str) -> None:
    if len(value) > MAX_ITEMS:
        raise BadSample("too_many_items", f"`{where}` has {len(value)} entries, more than {MAX_ITEMS}")


def _item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadSample("bad_json", f"{where} is a {type(item).__name__}, not an object")
    text, image = item.get("text"), item.get("image")
    if isinstance(text, str) and image is None:
        _check_encodable(text, where)
        return {"text": text}
    if isinstance(image, str) and image and text is None:
        return {name: value for name, value in item.items() if name not in ("text", "type")}
    raise BadSample("bad_json", f"{where} must hold either a string `text` or an image's name as `image`")


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample("bad_json", f"{where} holds a lone surrogate, which is not text: {error.reason}") from None
