"""Open questions as MMMU scores them: candidates are taken from what is said, and one of them must hold a reference."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SENTENCE = re.compile(r"\.\s(?=[A-Z])|\n")
_BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def open_answer(answer: str, references: Sequence[str]) -> float:
    """1.0 if a text among the candidates contains a reference, or a number is one, rounded to two digits; else 0.0."""
    right = [form for reference in references for form in _forms(reference)]
    texts = [form for form in right if isinstance(form, str)]
    for candidate in candidates(answer):
        if any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in right:
            return 1.0
    return 0.0


def candidates(answer: str) -> list[str | float]:
    """What of an answer may be meant: the shortest ends behind words such as "therefore", and the numbers in them."""
    parts = _ends(answer)
    parts += [number for part in list(parts) for pattern in _NUMBERS for number in pattern.findall(part)]
    return [form for part in parts for form in _forms(part)]


def _ends(answer: str) -> list[str]:
    answer = answer.strip().strip(".").lower()
    sentences = _SENTENCE.split(answer)
    found = []
    for place, sentence in enumerate(sentences):
        marks = (*_BEFORE_ANSWERS, "=") if place == len(sentences) - 1 else _BEFORE_ANSWERS
        shortest = None
        for mark in marks:
            if mark in sentence:
                end = sentence.split(mark)[-1].strip()
                if not shortest or len(end) < len(shortest):
                    shortest = end
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [answer]


def _forms(text: str) -> list[str | float]:
    """A number rounded, or the text in lower case; a single letter with a space, so that it is not found in any word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]
