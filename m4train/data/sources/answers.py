"""Records of a question and its answer, and of pictures and their captions, turned into canonical messages and items."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

from m4train.data.sources.dialogues import Message, exchange, parsed, turns
from m4train.data.sources.fields import ANSWERS, PAIRS, Record
from m4train.data.sources.gallery import Gallery
from m4train.data.sources.media import is_empty
from m4train.data.sources.placeholders import Place
from m4train.errors import BadSample

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def answered(record: Record, gallery: Gallery) -> list[Message]:
    """Alpaca, query and response with history, prompt and completion, question and answers with choices, problem and solution,
    and the chosen answer of preferences: the messages, with open places for images. Raises BadSample."""
    names = next((pair for pair in PAIRS if any(record.holds(name) for name in pair[0])), ((), ("chosen",)))
    asked = next((name for name in names[0] if record.holds(name)), None)
    said = next((name for name in (*names[1], *ANSWERS) if record.holds(name)), None)
    if said is None and not any(_given(record, name) for name in ANSWERS):
        raise BadSample("empty_answer", f"it asks under {asked!r}, but has no answer under {' or '.join(ANSWERS)}")
    before = _history(record, gallery) if asked else []
    if _holds_turns(record, said):
        answer = turns(record, str(said), gallery)
        if asked is None or answer[0]["role"] in ("user", "system"):  # the whole conversation again, question included
            if asked is not None:
                record.get(asked)
            return answer
        return [*before, *_question_turns(record, str(asked), gallery), *answer]
    choices = _choices(record)
    if asked is None:
        raise BadSample("bad_json", f"{said!r} is an answer without a question")
    answer_text = _answer(record, said, choices)
    if _holds_turns(record, asked):
        said_by_turns = _question_turns(record, asked, gallery)
        return [*before, *said_by_turns, exchange([], gallery.parts(answer_text))[1]]
    question = _text(record.get(asked), asked)
    if asked == "instruction" and record.holds("input"):
        question += "\n" + _text(record.get("input"), "input")
    if choices:
        question += "\n" + "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    return [*before, *exchange(gallery.parts(question), gallery.parts(answer_text))]


def _given(record: Record, name: str) -> bool:
    """Whether a field has a value that counts as an answer although it looks empty, such as 0 or false."""
    value = record.content.get(record.named(name))
    return value is False or (value == 0 and not isinstance(value, str))


def _holds_turns(record: Record, name: str | None) -> bool:
    value = record.content.get(record.named(name)) if name is not None else None
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
    return [
        message | ({"weight": 0.0} if message["role"] == "assistant" else {})
        for message in turns(record, name, gallery)
    ]


def _history(record: Record, gallery: Gallery) -> list[Message]:
    """The exchanges before: [[question, answer], ...]."""
    history = parsed(record.get("history") or [], "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadSample("bad_json", "`history` must be a list of [question, answer]")
    pairs = [[_text(said, "history") for said in pair] for pair in history]
    return [message for asked, said in pairs for message in exchange(gallery.parts(asked), gallery.parts(said))]


def _choices(record: Record) -> dict[str, str]:
    """The choices of a question by their letters."""
    name = next((name for name in ("choices", "options") if record.holds(name)), None)
    if name is None:
        return {}
    choices = record.get(name)
    choices = _written(choices)
    if isinstance(choices, dict) and all(isinstance(choices.get(each), list) for each in ("label", "text")):  # ARC
        choices = dict(zip(choices["label"], choices["text"]))
    if isinstance(choices, list):
        choices = dict(zip(_LETTERS, choices)) if len(choices) <= len(_LETTERS) else None
    if not isinstance(choices, dict) or not all(isinstance(text, (str, int, float)) for text in choices.values()):
        raise BadSample("bad_json", f"`{name}` must be a list of up to {len(_LETTERS)} texts, or an object of them")
    return {str(letter): str(text) for letter, text in choices.items()}


def _written(value: Any) -> Any:
    """A list or an object that is written as a text, as JSON or as Python writes it; what is none as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return value


def _answer(record: Record, name: str | None, choices: dict[str, str]) -> str:
    """The text of the answer; of several that count as right the one that most give, the first of them."""
    value = record.get(name) if name is not None else None
    if name is None:  # an answer that looks empty: the number 0, or false
        name = next(each for each in ANSWERS if _given(record, each))
        value = record.get(name)
    value = _written(value) if name == "answers" else value
    if isinstance(value, dict) and isinstance(value.get("text"), (str, list)):  # SQuAD
        value = value["text"]
    if isinstance(value, list):
        texts = [
            _text(each.get("answer", each.get("text")) if isinstance(each, dict) else each, name) for each in value
        ]
        filled = [text for text in texts if text.strip()]
        value = max(filled, key=filled.count, default="")
    if not choices:
        return _text(value, name)
    letters = list(choices)
    letter = letters[value] if type(value) is int and 0 <= value < len(letters) else str(value).strip().strip("().")
    if letter not in choices:
        letter = next((each for each, text in choices.items() if text.strip() == str(value).strip()), "")
    if not letter and isinstance(value, str) and value.strip().isdigit() and int(value) < len(letters):
        letter = letters[int(value)]
    if not letter:
        raise BadSample("not_a_choice", f"the answer {value!r} is none of the choices {', '.join(letters)}")
    return f"{letter}. {choices[letter]}"


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return json.dumps(value)
    if not isinstance(value, str) and not is_empty(value):
        raise BadSample("bad_json", f"`{name}` is a {type(value).__name__}, but must be a text")
    return value or ""


def with_chosen(messages: list[Message], record: Record, gallery: Gallery) -> list[Message]:
    """The messages with the answer that is preferred, if they end without one. Raises BadSample."""
    if messages[-1]["role"] == "assistant" or not record.holds("chosen"):
        return messages
    chosen = record.get("chosen")
    if isinstance(chosen, str):
        return [*messages, exchange([], gallery.parts(chosen))[1]]
    return [*messages, *turns(record, "chosen", gallery)]


def caption_pairs(record: Record, gallery: Gallery) -> dict[str, Any]:
    """Pictures with what is said of them, or plain text, as a document: each picture before its caption if there is one
    for each, else all pictures before the text. Raises BadSample."""
    name = next(name for name in ("caption", "captions", "text") if record.holds(name))
    value = record.get(name)
    texts = [_text(each, name) for each in (value if isinstance(value, list) else [value])]
    texts = [text for text in texts if text.strip()]
    contents = [gallery.parts(text, in_turns=False) for text in texts]
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
