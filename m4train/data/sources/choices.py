"""The choices of a question: where a record has them, and which of them its answer means."""

from __future__ import annotations

import re
from typing import Any

from m4train.data.sources.fields import CHOICES, Record, is_choice
from m4train.data.sources.media import is_empty, says_nothing, written
from m4train.errors import BadSample, described

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OWN = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):、：])\s*(.*\S)\s*", re.DOTALL)  # a choice with its letter
_BETWEEN = re.compile(r"\s*(?:[,;/&、]|\band\b)\s*")


def choices_of(record: Record) -> dict[str, str]:
    """The choices of a question by their letters, under `choices` or `options` or in columns A, B ..., option_a, choice_1 ...
    Raises BadSample."""
    name = next((name for name in CHOICES if record.offers(name)), None)
    if name is None:
        return _in_columns(record)
    choices = written(record.get(name))
    if isinstance(choices, dict) and all(isinstance(choices.get(each), list) for each in ("label", "text")):  # ARC
        choices = dict(zip(map(str, choices["label"]), choices["text"]))
    if isinstance(choices, list):
        choices = dict(zip(_LETTERS, choices)) if len(choices) <= len(_LETTERS) else None
    if not isinstance(choices, dict) or not all(isinstance(text, (str, int, float)) for text in choices.values()):
        raise BadSample("bad_json", f"`{name}` must be a list of up to {len(_LETTERS)} texts, or an object of them")
    return _without_own_letters({str(letter): str(text) for letter, text in choices.items()})


def _in_columns(record: Record) -> dict[str, str]:
    """The choices that a record has each in a field of its own."""
    kinds: dict[str, dict[str, str]] = {}
    for name, value in record.content.items():
        if not is_choice(str(name)) or not isinstance(value, (str, int, float)) or not record.offers(name):
            continue
        if is_empty(value) or says_nothing(str(value)):
            record.leave(str(name))
            continue
        mark = re.sub(r"^(option|choice|op)[\s_-]?", "", name, flags=re.IGNORECASE)
        kinds.setdefault(name[: len(name) - len(mark)].lower(), {})[mark.upper()] = name
    for marks in kinds.values():
        if len(marks) < 2 or not ({"A", "B"} <= set(marks) or {"1", "2"} <= set(marks)):
            continue
        by_number = "1" in marks
        order = sorted(marks, key=lambda mark: (len(mark), mark))
        letters = _LETTERS[: len(order)] if by_number else order
        return _without_own_letters({letter: str(record.get(marks[mark])) for letter, mark in zip(letters, order)})
    return {}


def _without_own_letters(choices: dict[str, str]) -> dict[str, str]:
    """The choices without the letters that their texts begin with, if all do and each with its own."""
    own = {letter: _OWN.fullmatch(text) for letter, text in choices.items()}
    if all(match is not None and (match[1] or match[2]).upper() == letter for letter, match in own.items()):
        return {letter: match[3] for letter, match in own.items() if match is not None}
    return choices


def chosen(value: Any, choices: dict[str, str], votes: bool = False) -> list[str]:
    """The letters of the choices that a value means: a letter, a text, a number from 0 on, a choice as it is shown, or
    several of them; of `votes` the one most often given. Raises BadSample `not_a_choice`."""
    if isinstance(value, dict):
        value = value.get("text", value.get("answer"))
    values = [each for each in value if not is_empty(each)] if isinstance(value, list) else [value]
    found = []
    for each in values:
        letters = _letters(each, choices)
        if not letters:
            raise BadSample("not_a_choice", f"the answer {described(each)} is none of {described(choices)}")
        found += letters
    if votes and len(set(found)) < len(found):
        return [max(found, key=found.count)]
    return [letter for letter in choices if letter in found]


def _letters(value: Any, choices: dict[str, str]) -> list[str]:
    one = _letter(value, choices)
    if one is not None:
        return [one]
    if not isinstance(value, str):
        return []
    parts = [part for part in _BETWEEN.split(value.strip().strip("()[]")) if part]
    if len(parts) == 1 and parts[0].isupper() and list(parts[0]) == sorted(set(parts[0])):
        parts = list(parts[0])  # AC
    several = [part.strip("().") for part in parts]
    return several if len(several) > 1 and all(part in choices for part in several) else []


def _letter(value: Any, choices: dict[str, str]) -> str | None:
    letters = list(choices)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int and 0 <= value < len(letters):
        return letters[value]
    said = str(value).strip()
    bare = said.strip("().: ")
    if bare in choices or (len(bare) == 1 and bare.upper() in choices):
        letter = bare if bare in choices else bare.upper()
        other = next((each for each, text in choices.items() if text.strip() == said and each != letter), letter)
        if other != letter:
            detail = f"the answer {described(value)} may mean choice {letter} or the text of choice {other}"
            raise BadSample(
                "not_a_choice", f"{detail}: write the one that is right as it stands in the question, with its letter"
            )
        return letter
    for letter, text in choices.items():
        if text.strip() == said:
            return letter
    own = _OWN.fullmatch(said)
    if own is not None and choices.get((own[1] or own[2]).upper(), "").strip() == own[3]:
        return (own[1] or own[2]).upper()
    return letters[int(said)] if said.isdecimal() and int(said) < len(letters) else None


def stand_in(question: str, choices: dict[str, str]) -> bool:
    """Whether a question lists its choices already, each after its letter."""
    marks = (rf"(?:^|\s)\(?{re.escape(letter)}[.):]\)?\s*{re.escape(text.strip())}" for letter, text in choices.items())
    return all(re.search(mark, question) for mark in marks)


def shown(letters: list[str], choices: dict[str, str]) -> str:
    """Choices as they are written in a question or answer, each on a line."""
    return "\n".join(f"{letter}. {choices[letter]}" for letter in letters)
