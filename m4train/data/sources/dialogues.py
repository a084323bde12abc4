"""Conversations as others write them, turned into canonical messages: LLaVA, ShareGPT, OpenAI and Cauldron styles.

Images stand as the placeholder `<image>` in a text, or as items of a content list; if a text has none, all images go
before what the first user says, as The Cauldron means it. What a record says under `system` comes first, unless a turn does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from m4train.data.documents.sample import Sample, sample_from_dict
from m4train.errors import BadSample

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = re.compile(r"\n?<image>\n?")


def question_answer_pairs(turns: Any, images: Sequence[str], system: Any = None) -> Sample:
    """The Cauldron, FineVision, Docmatix, m4: `[{"user":, "assistant":, "source":}]`, the images of these names before the first
    turn, and before all what the record has under `system`. Raises BadSample.
    """
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("bad_json", "the turns must be a list of objects with `user` and `assistant`")
    messages = []
    for turn in turns:
        for role in ("user", "assistant"):
            if not isinstance(turn.get(role), str):
                raise BadSample("bad_json", f"a turn has no text for {role!r}")
            messages.append({"role": role, "content": [{"text": turn[role]}]})
    messages[0]["content"] = [*({"image": name} for name in images), *messages[0]["content"]]
    source = turns[0].get("source")
    content = {"messages": _after_system(messages, system), "source": {"dataset": source} if source else {}}
    return sample_from_dict(content)


def dialogue(record: Any, images: Sequence[str] | None = None) -> Sample:
    """A record with `messages`, `conversations` or `texts`; roles under `role` or `from`, what is said under `content` or `value`.

    `images` are the names that placeholders stand for; if not given, those in the record's `images` or `image`.
    Raises BadSample if their numbers differ, and for anything that cannot be read.
    """
    if not isinstance(record, dict):
        raise BadSample("bad_json", f"a {type(record).__name__} where an object is expected")
    turns = next((record[name] for name in ("messages", "conversations", "texts") if record.get(name)), None)
    if not isinstance(turns, list):
        raise BadSample("bad_json", "none of `messages`, `conversations` and `texts` is a list of turns")
    names = list(images) if images is not None else _named(record)
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    places = [item for message in messages for item in message["content"] if "image" in item]
    open_places = [item for item in places if item["image"] is None]
    if names and not places:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [*({"image": name} for name in names), *first["content"]]
    elif len(open_places) == len(names):
        for item, name in zip(open_places, names):
            item["image"] = name
    elif open_places or names != [item["image"] for item in places]:  # the same names again are not further images
        found = f"{len(open_places)} places for images but {len(names)} images"
        named = len(places) - len(open_places)
        raise BadSample("image_count", found + (f", next to {named} that name their own" if named else ""))
    source = {"dataset": record["source"]} if isinstance(record.get("source"), str) else {}
    return sample_from_dict({"messages": _after_system(messages, record.get("system")), "source": source})


def _after_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    if not isinstance(system, str):
        raise BadSample("bad_json", f"`system` is a {type(system).__name__}, but must be a string")
    return [{"role": "system", "content": [{"text": system}]}, *messages]


def _named(record: dict[str, Any]) -> list[str]:
    value = record.get("images") or record.get("image") or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample("bad_json", "`images` must be a list of paths or data URLs")
    return names


def _message(turn: Any, number: int) -> dict[str, Any]:
    role = _ROLES.get(str(turn.get("role", turn.get("from")))) if isinstance(turn, dict) else None
    if role is None:
        raise BadSample("bad_json", f"turn {number} has no role that is known ({', '.join(_ROLES)})")
    content = turn.get("content", turn.get("value"))
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list):
        raise BadSample("bad_json", f"turn {number} says nothing")
    return {"role": role, "content": [part for item in items for part in _parts(item, number)] or [{"text": ""}]}


def _parts(item: Any, number: int) -> list[dict[str, Any]]:
    """One item of a content list as canonical items; an image whose name is not yet known has None."""
    if isinstance(item, dict) and isinstance(item.get("text"), str) and item.get("type", "text") == "text":
        pieces = _PLACEHOLDER.split(item["text"])
        parts: list[dict[str, Any]] = []
        for place, text in enumerate(pieces):
            parts += [{"image": None}] if place else []
            parts += [{"text": text}] if text else []
        return parts
    if isinstance(item, dict) and item.get("type") in ("image", "image_url"):
        name = item.get("image", item.get("url", item.get("image_url", item.get("path"))))
        return [{"image": name.get("url") if isinstance(name, dict) else name}]
    raise BadSample("unknown_item", f"turn {number} holds an item that is neither text nor image: {str(item)[:80]}")
