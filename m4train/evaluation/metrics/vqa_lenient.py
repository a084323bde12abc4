"""VQA accuracy that drops all punctuation: kinder than the official one, and not comparable with published numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {**{word: str(number) for number, word in enumerate(_NUMBERS)}, "none": "0"}
_ARTICLES = {"a", "an", "the"}
# Contractions by the words they become when their apostrophe is missing; words that mean something else stay as they are.
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm
i've isn't it'd it'll let's ma'am might've mightn't must've mustn't o'clock oughtn't shan't should've shouldn't
somebody's someone's something's that'd that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've
why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def vqa_accuracy_lenient(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (Antol et al., 2015, as https://visualqa.org/evaluation.html states it).

    For every reference left out in turn: how many of the others agree with the answer, a third of it, at most 1; the mean
    of that. Of ten references, three that agree make 0.9 and four 1.0. If fewer than three others remain, as many as
    remain must agree; a single reference must be the answer. Answer and references are compared as `normalise` leaves them.
    """
    said, given = normalise(answer), [normalise(reference) for reference in references]
    if len(given) == 1:
        return float(said == given[0])
    matches = sum(said == reference for reference in given)
    enough = min(3, len(given) - 1)
    return sum(min(1.0, (matches - (said == left)) / enough) for left in given) / len(given)


def normalise(text: str) -> str:
    """An answer as VQA compares it: lower case; no articles; digits for number words; apostrophes where contractions lack
    them; other punctuation than ' and : is a space, a full stop or comma inside a number stays or goes without one."""
    text = " ".join(text.lower().split())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]", " ", text)
    words = (_DIGITS.get(word, _CONTRACTIONS.get(word, word)) for word in text.split() if word not in _ARTICLES)
    return " ".join(words)
