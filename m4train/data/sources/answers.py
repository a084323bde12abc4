"""Records of a question and its answer, and of pictures and their captions, turned into canonical messages and items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from m4train.data.sources.choices import choices_of, chosen, shown, stand_in
from m4train.data.sources.dialogues import Message, exchange, parsed, turns
from m4train.data.sources.fields import ANSWER_KEYS, ANSWERS, BEFORE, CAPTIONS, PAIRS, QUESTIONS, TITLE, Record
from m4train.data.sources.gallery import Gallery
from m4train.data.sources.media import is_empty, says_nothing, written
from m4train.data.sources.placeholders import Place
from m4train.errors import BadSample, described

_NO_INPUT = ("<noinput>", "<no input>", "n/a", "nan", "none")  # what is written for an instruction without input


def answered(record: Record, gallery: Gallery) -> list[Message]:
    """Alpaca, query and response with history, prompt and completion, question and answers with choices, problem and solution,
    and the chosen answer of preferences: the messages, with open places for images. Raises BadSample."""
    names = next((pair for pair in PAIRS if any(record.offers(name) for name in pair[0])), ((), ("chosen",)))
    asked = next((name for name in names[0] if record.offers(name)), None)
    keys = [name for name in ANSWER_KEYS if record.offers(name)]
    said = next((name for name in (*names[1], *ANSWERS, *keys) if record.offers(name)), None)
    if said is None and not any(_given(record, name) for name in ANSWERS):
        raise BadSample(
            "empty_answer",
            f"it asks under {asked!r}, but has no answer under {' or '.join(ANSWERS)}: say where it is with fields={{answer: ...}}",
        )
    earlier = _history(record, gallery) if asked else []
    if _holds_turns(record, said):
        answer = turns(record, str(said), gallery)
        if asked is None or answer[0]["role"] in ("user", "system"):  # the whole conversation again, question included
            if asked is not None:
                record.get(asked)
            return answer
        return [*earlier, *_question_turns(record, str(asked), gallery), *answer]
    if asked is None:
        raise BadSample("bad_json", f"{said!r} is an answer without a question")
    choices = choices_of(record)
    answer_text = _answer(record, said, choices, keys)
    if _holds_turns(record, asked):
        said_by_turns = _question_turns(record, asked, gallery)
        return [*earlier, *said_by_turns, exchange([], gallery.parts(answer_text))[1]]
    question = _question(record, asked)
    if choices and not stand_in(question, choices):
        question += "\n" + shown(list(choices), choices)
    return [*earlier, *exchange(gallery.parts(question), gallery.parts(answer_text))]


def asked_often(record: Record, gallery: Gallery) -> list[Message]:
    """Several questions about the same pictures, as lists under `questions` and `answers`. Raises BadSample."""
    asked, said = (written(record.get(name)) for name in (QUESTIONS, "answers"))
    if not isinstance(asked, list) or not isinstance(said, list) or len(asked) != len(said):
        counts = [len(each) if isinstance(each, list) else f"a {type(each).__name__}" for each in (asked, said)]
        raise BadSample(
            "bad_json", f"`questions` and `answers` must be lists of as many, but are {counts[0]} and {counts[1]}"
        )
    pairs = [(_text(question, QUESTIONS), _most_given(answer, "answers")) for question, answer in zip(asked, said)]
    understood = gallery.fits([question for question, _ in pairs])
    return [
        message
        for question, answer in pairs
        for message in exchange(gallery.parts(question, in_turns=understood), gallery.parts(answer, in_turns=False))
    ]


def _question(record: Record, asked: str) -> str:
    """What is asked: an instruction, what belongs to the question, the question, and the input of the instruction, each on a
    line. Raises BadSample `conflicting_questions` for several that are none of these."""
    names = dict.fromkeys(name for pair in PAIRS for name in pair[0] if record.offers(name) or name == asked)
    found = {name: _text(record.content.get(record.named(name)), name).strip() for name in names}
    kept = {
        name: text
        for number, (name, text) in enumerate(found.items())
        if not any(
            text in other and (text != other or place < number)
            for place, other in enumerate(found.values())
            if place != number
        )
    }
    for name in found:
        record.get(name)
    first, last = kept.pop("instruction", None), None
    if "instruction" in found:
        last = kept.pop("input", None) or kept.pop("inputs", None)
    if len(kept) > 1:
        raise BadSample(
            "conflicting_questions",
            f"it asks different things under {' and '.join(map(repr, kept))}: say which is the question with "
            f"fields={{question: ...}}, or leave the others with ignore_fields=[...]",
        )
    last = "" if last is not None and last.lower() in _NO_INPUT else last
    parts = [first, *before(record, BEFORE), *kept.values(), last]
    return "\n".join(part for part in parts if part)


def before(record: Record, names: Sequence[str]) -> list[str]:
    """What a record has under these names of what belongs to its question. Raises BadSample."""
    found = [_joined(record.get(name), name) for name in names if record.offers(name)]
    return [text for text in found if not says_nothing(text)]


def _joined(value: Any, name: str) -> str:
    """A text, or several one below the other. Raises BadSample."""
    value = written(value)
    return "\n".join(_text(each, name) for each in (value if isinstance(value, list) else [value]))


def _given(record: Record, name: str) -> bool:
    """Whether a field has a value that counts as an answer although it looks empty, such as 0 or false."""
    value = record.content.get(record.named(name))
    return value is False or (value == 0 and not isinstance(value, str))


def _holds_turns(record: Record, name: str | None) -> bool:
    value = record.content.get(record.named(name)) if name is not None else None
    if isinstance(value, dict):  # as OpenAI stores what was asked, in preference data
        value = value.get("messages")
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & set(value[0]))
    )


def _question_turns(record: Record, name: str, gallery: Gallery) -> list[Message]:
    """What was said before the answer: context, not to be learned."""
    if not _holds_turns(record, name):
        return exchange(gallery.parts(_text(record.get(name), name)), [])[:1]
    value = record.content.get(record.named(name))
    if isinstance(value, dict):
        said = turns(record.part(record.get(name), name), "messages", gallery)
    else:
        said = turns(record, name, gallery)
    return [message | ({"weight": 0.0} if message["role"] == "assistant" else {}) for message in said]


def _history(record: Record, gallery: Gallery) -> list[Message]:
    """The exchanges before: [[question, answer], ...]."""
    history = parsed(record.get("history") or [], "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadSample("bad_json", "`history` must be a list of [question, answer]")
    pairs = [[_text(said, "history") for said in pair] for pair in history]
    return [message for asked, said in pairs for message in exchange(gallery.parts(asked), gallery.parts(said))]


def _answer(record: Record, name: str | None, choices: dict[str, str], keys: Sequence[str]) -> str:
    """The text of the answer, with choices those of them that are right; of several `answers` the one that most give, the first
    of them. `keys` are further fields that say which choice is right. Raises BadSample."""
    if name is None:  # an answer that looks empty: false
        name = next(each for each in ANSWERS if _given(record, each))
    value = written(record.get(name)) if name == "answers" or choices else record.get(name)
    if isinstance(value, dict) and isinstance(value.get("text"), (str, list)):  # SQuAD
        value = value["text"]
    if choices:
        letters = chosen(value, choices, votes=name == "answers")
        for key in keys if name not in keys else ():
            other = chosen(written(record.get(key)), choices)
            if other != letters:
                detail = f"{name!r} is {', '.join(letters)}, but {key!r} {', '.join(other)}: leave one with ignore_fields=[...]"
                raise BadSample("conflicting_answers", detail)
        return shown(letters, choices)
    return _most_given(value, name)


def _most_given(value: Any, name: str) -> str:
    """An answer, or of several the one that most give, the first of them. Raises BadSample."""
    if isinstance(value, list):
        texts = [
            _text(each.get("answer", each.get("text")) if isinstance(each, dict) else each, name) for each in value
        ]
        filled = [text for text in texts if text.strip()]
        value = max(filled, key=filled.count, default="")
    return _text(value, name)


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return json.dumps(value)
    if not isinstance(value, str) and not is_empty(value):
        raise BadSample("bad_json", f"`{name}` is a {type(value).__name__}, but must be a text")
    return value if isinstance(value, str) else ""


def with_chosen(messages: list[Message], record: Record, gallery: Gallery) -> list[Message]:
    """The messages with the answer that is preferred, if they end without one. Raises BadSample."""
    if messages[-1]["role"] == "assistant" or not record.holds("chosen"):
        return messages
    chosen = record.get("chosen")
    if isinstance(chosen, str):
        return [*messages, exchange([], gallery.parts(chosen))[1]]
    return [*messages, *turns(record, "chosen", gallery)]


def with_context(messages: list[Message], record: Record) -> list[Message]:
    """The messages with the context, passage and hint that the options name before what the user says first. Raises BadSample."""
    found = before(record, [name for name in BEFORE if name in record.reading.fields])
    first = next((message for message in messages if message["role"] == "user"), None)
    if not found or first is None:
        return messages
    text = "".join(f"{each}\n" for each in found)
    items = first["content"]
    if items and "text" in items[0]:
        items[0] = items[0] | {"text": text + items[0]["text"]}
    else:
        items.insert(0, {"text": text})
    return messages


def caption_pairs(record: Record, gallery: Gallery) -> dict[str, Any]:
    """Pictures with what is said of them, or plain text, as a document: each picture before its caption if there is one
    for each, else all pictures before the text. Raises BadSample."""
    name = next(name for name in (*CAPTIONS, TITLE) if record.offers(name))
    value = written(record.get(name)) if name == "captions" else record.get(name)
    texts = [_text(each, name) for each in (value if isinstance(value, list) else [value])]
    texts = [text for text in texts if text.strip() and not says_nothing(text)]
    if not texts:
        raise BadSample("no_text", f"`{name}` is {described(value)}, which programs write for a text that is missing")
    understood = gallery.fits(texts)
    contents = [gallery.parts(text, in_turns=understood) for text in texts]
    pictures = len(gallery.listed)
    if pictures > 1 and len(texts) == pictures and not any("image" in item for parts in contents for item in parts):
        contents = [[{"image": Place(number)}, *parts] for number, parts in enumerate(contents)]
    else:
        contents = [_on_lines(contents)]
    gallery.fill(contents, contents[0])
    return {"items": [item for parts in contents for item in parts]}


def _on_lines(contents: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Several captions of one picture, each on a line of its own."""
    items: list[dict[str, Any]] = []
    for content in contents:
        if items and content and "text" in items[-1] and "text" in content[0]:
            items[-1] = {"text": items[-1]["text"] + "\n" + content[0]["text"]}
            content = content[1:]
        items += content
    return items
