"""Conversations as others write them, turned into canonical messages: LLaVA, ShareGPT, OpenAI, Anthropic, LLaMA-Factory and
Cauldron styles.

Images stand as the placeholder `<image>` in a text, or as items of a content list; if a text has none, all images go
before what the first user says, as The Cauldron means it. What a record says under `system` comes first, unless a turn does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from m4train.data.sources.fields import SYSTEM, Record
from m4train.data.sources.gallery import Gallery, Item, Own, listed_pictures, picture_of
from m4train.data.sources.media import is_empty, looks_like_media, written
from m4train.data.sources.placeholders import Place
from m4train.errors import BadSample, described

_ROLES = {
    "user": "user human prompter",
    "assistant": "assistant gpt model bot chatgpt ai bing bard llm",
    "system": "system developer",
    "tool": "tool function observation tool_response tool_result function_response ipython",
    "call": "function_call tool_call",  # what the assistant says to a tool
}
ROLES = {name: role for role, names in _ROLES.items() for name in names.split()}
_TEXT_ITEMS = ("text", "input_text", "output_text", None)
_IMAGE_ITEMS = ("image", "image_url", "input_image", "image_file")
_CALL_ITEMS = ("tool_use", "tool_call", "function_call")

NAME_IN_TEXT = "a text is nothing but {!r}: make it an item of type image, or set placeholder=literal if it is text"

Message = dict[str, Any]


def parsed(value: Any, name: str) -> Any:
    """A list that may be stored as its JSON. Raises BadSample for a string that is none."""
    if not isinstance(value, str):
        return value
    found = written(value)
    if isinstance(found, str):
        raise BadSample(
            "bad_json", f"`{name}` is a string that is not JSON, nor a list that Python wrote: {value[:80]!r}"
        )
    return found


def turns(record: Record, name: str, gallery: Gallery) -> list[Message]:
    """The messages of the list of turns that a record has under `name`; places for images are still open. Raises BadSample."""
    found = parsed(record.get(name), name)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        raise BadSample("bad_json", f"`{name}` must be a list of turns")
    messages = []
    for number, turn in enumerate(found):
        if not isinstance(turn, dict):
            raise BadSample("bad_json", f"turn {number} is a {type(turn).__name__}, but must be an object")
        messages.append(_message(record.part(turn, f"{name}[]"), number, gallery))
    called = [message.pop("called", False) for message in messages]
    if any(called) and all(each for each, message in zip(called, messages) if message["role"] == "assistant"):
        raise BadSample("empty_answer", "it calls tools, but no answer follows that would be learned")
    return messages


def question_answer_pairs(record: Record, name: str, gallery: Gallery) -> tuple[list[Message], Any]:
    """The Cauldron, FineVision, Docmatix, m4: `[{"user":, "assistant":, "source":}]`, and the first `source`. Raises BadSample."""
    found = parsed(record.get(name), name)
    if not isinstance(found, list) or not found or not all(isinstance(turn, dict) for turn in found):
        raise BadSample("bad_json", "the turns must be a list of objects with `user` and `assistant`")
    messages: list[Message] = []
    understood = gallery.fits([turn["user"] for turn in found if isinstance(turn.get("user"), str)])
    for turn in found:
        part = record.part(turn, f"{name}[]")
        for role in ("user", "assistant"):
            said = part.get(role)
            if role == "assistant" and is_empty(said):
                said = ""
            if not isinstance(said, str):
                raise BadSample("bad_json", f"a turn has no text for {role!r}")
            messages.append({"role": role, "content": gallery.parts(said, in_turns=understood and role == "user")})
        messages[-1] |= _weight(part)
    return messages, found[0].get("source")


def with_system(messages: list[Message], record: Record, gallery: Gallery) -> list[Message]:
    """The messages after what the record has under `system`, unless one of them is of that role. Raises BadSample."""
    name = next((name for name in SYSTEM if record.offers(name)), None)
    if name is None or any(message["role"] == "system" for message in messages):
        return messages
    system = record.get(name)
    if not isinstance(system, str):
        raise BadSample("bad_json", f"`{name}` is a {type(system).__name__}, but must be a string")
    return [{"role": "system", "content": gallery.parts(system, in_turns=False)}, *messages]


def placed(messages: list[Message], gallery: Gallery) -> list[Message]:
    """The messages with every place for an image filled. Raises BadSample."""
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    gallery.fill([message["content"] for message in messages], first["content"])
    return messages


def _weight(part: Record) -> dict[str, float]:
    """The weight of a turn, if it has one that is not 1."""
    weight = part.weight("a turn")
    return {} if weight == 1 else {"weight": weight}


def _message(turn: Record, number: int, gallery: Gallery) -> Message:
    said_by = turn.first("role", "from")
    role = ROLES.get(str(said_by).strip(" \t\r\n<|>").lower())
    if role is None:
        who = f"turn {number} has the role {described(said_by)}, which is none of {', '.join(ROLES)}: rename it"
        if said_by is None:
            who = f"turn {number} has no role, but is {described(turn.content)}: say which is which, as fields={{role: ..., content: ...}}"
        raise BadSample("bad_json", who)
    calls = [_call(call, number) for call in _calls(turn)]
    content = _said(turn, "content", "value")
    if isinstance(content, dict):
        content = [content]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, list):
        raise BadSample("bad_json", f"turn {number} says a {type(content).__name__}, not a text or a list of items")
    if len(items) > 1 and not turn.reading.placeholders.literal:
        _check_names(items)
    parts = [part for item in items for part in _parts(turn, item, number, gallery)] or [{"text": ""}]
    called = any(part.pop("call", False) for part in parts) or calls or role == "call"
    parts += [{"text": call} for call in calls]
    message = {"role": "assistant" if role == "call" else role, "content": parts} | _weight(turn)
    _place_own(turn, parts)
    return message | ({"weight": 0.0} if called or role == "tool" else {}) | ({"called": True} if called else {})


def _check_names(items: list[Any]) -> None:
    """Raises BadSample `unread_media` if one of several items is nothing but the name, address or content of a picture."""
    for item in items:
        text = item if isinstance(item, str) else item.get("text") if isinstance(item, dict) else None
        if isinstance(text, str) and looks_like_media(text):
            raise BadSample("unread_media", NAME_IN_TEXT.format(text.strip()[:120]))


def _calls(turn: Record) -> list[Any]:
    """The calls of tools that a turn makes, next to what it says."""
    found: list[Any] = []
    for name in ("tool_calls", "function_call"):
        value = parsed(turn.get(name), name) if turn.holds(name) else None
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def _call(call: Any, number: int) -> str:
    """A call of a tool as text: its name and arguments as JSON. It is context, as what the tool says. Raises BadSample."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict):
        raise BadSample("bad_json", f"turn {number} calls a tool by a {type(inner).__name__}, not an object")
    said: Any = next((inner[name] for name in ("arguments", "input", "parameters") if name in inner), {})
    with suppress(ValueError, RecursionError):
        said = json.loads(said) if isinstance(said, str) else said
    return json.dumps({"name": inner.get("name"), "arguments": said}, ensure_ascii=False, default=str)


def _said(part: Record, *names: str) -> Any:
    """What is under the first of some names that holds something; blank text if none does."""
    found = part.first(*names)
    if found is None:
        found = next((text for text in map(part.get, names) if isinstance(text, str)), "")
    return found


def _place_own(turn: Record, parts: list[Item]) -> None:
    """Gives the pictures that a turn has itself to the places in it, or puts them first. Raises BadSample."""
    pictures, _ = listed_pictures(turn)
    if not pictures:
        return
    places = [item for item in parts if isinstance(item.get("image"), Place)]
    if places and len(places) != len(pictures):
        raise BadSample("image_count", f"a turn has {len(places)} places for images but {len(pictures)} images")
    numbers = [item["image"].number for item in places]
    for order, (item, number) in enumerate(zip(places, numbers)):
        if number is not None and not 0 <= number < len(pictures):
            raise BadSample("image_count", f"a place is for image {number + 1} of {len(pictures)}, which is none")
        item["image"] = Own(pictures[order if number is None else number])
    if not places:
        parts[:0] = [{"image": Own(picture)} for picture in pictures]


def _parts(turn: Record, item: Any, number: int, gallery: Gallery) -> list[Item]:
    """One item of a content list as canonical items. Raises BadSample."""
    if isinstance(item, str):
        return gallery.parts(item)
    if not isinstance(item, dict):
        raise BadSample("unknown_item", f"turn {number} holds a {type(item).__name__} where an item is expected")
    part = turn.part(item, "content[]")
    kind = part.get("type")
    if kind is None:
        kind = "image" if part.holds("image") or part.holds("image_url") else None
    if kind in _TEXT_ITEMS:
        text = _said(part, "text", "value", "content")
        if isinstance(text, str):
            weight = part.weight("an item")
            said = gallery.parts(text) if text else []
            return said if weight == 1 else [each | {"weight": weight} for each in said]
    if kind in _CALL_ITEMS:
        part.leave("type", "id", "name", "input", "arguments", "parameters", "function", "index")
        return [{"text": _call(item, number), "call": True}]
    if kind in _IMAGE_ITEMS:
        part.leave("detail", "width", "height", "alt", "crc32", "min_pixels", "max_pixels")
        index = part.get("index")
        if isinstance(said := part.get("text"), str) and said.strip():
            raise BadSample(
                "bad_json", f"turn {number} has an item with both a picture and a text: give each its own item"
            )
        value = part.first("image", "image_url", "url", "path", "source", "value", "bytes", "base64", "data")
        if is_empty(value):
            if index is not None and (type(index) is not int or index < 0):
                raise BadSample("bad_json", f"turn {number} has an image item with index {described(index)}")
            return [{"image": Place(index)}]
        return [{"image": Own(picture_of(value, part, "image"))}]
    raise BadSample("unknown_item", f"turn {number} holds an item that is neither text nor image: {described(item)}")


def exchange(question: Sequence[Item], answer: Sequence[Item], weight: float = 1.0) -> list[Message]:
    """One question and its answer."""
    said: Message = {"role": "assistant", "content": list(answer) or [{"text": ""}]}
    return [
        {"role": "user", "content": list(question) or [{"text": ""}]},
        said | ({} if weight == 1 else {"weight": weight}),
    ]
