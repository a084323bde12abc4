"""Scores of a generated answer against the answers that count as right, each from 0 to 1."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

from m4train.errors import ConfigError

Metric = Callable[[str, Sequence[str]], float]

ANLS_THRESHOLD = 0.5
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


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, apart from how much white space there is, else 0.0."""
    return float(any(answer.split() == reference.split() for reference in references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
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


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (Biten et al., 2019) of one answer: to the nearest reference, 1 - distance
    / length of the longer one, or 0 if that distance is half the length or more. Case and white space do not count."""
    return max((_similarity(_plain(answer), _plain(reference)) for reference in references), default=0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    distance = _edits(a, b) / longest if longest else 0.0
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def _edits(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions of a character."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (one != other)))
    return row[-1]


METRICS: dict[str, Metric] = {"exact_match": exact_match, "vqa_accuracy": vqa_accuracy, "anls": anls}


def load_metric(name: str) -> Metric:
    """The metric of that name, or the function `package.module:function`, called as function(answer, references).

    Raises ConfigError if there is none.
    """
    if name in METRICS:
        return METRICS[name]
    module_name, _, function_name = name.partition(":")
    try:
        metric = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(METRICS)
        raise ConfigError(
            f"evaluation.metric is {name!r}, but must be {known} or package.module:function ({error})."
        ) from error
    return metric


def metric_name(name: str) -> str:
    """What a metric is called in results."""
    return name.partition(":")[2] or name
