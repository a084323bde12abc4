"""VQA accuracy of answers that several people gave references for.

`vqa_accuracy` is what the official evaluation of VQAv2 computes (also used for OK-VQA and VizWiz), with its quirks;
`textvqa_accuracy` treats texts first as the server of TextVQA does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {**{word: str(number) for number, word in enumerate(_NUMBERS)}, "none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # in the order in which it is treated
_NUMBER_COMMA = re.compile(r"\d,\d")
# The published expression has one more group, which is always true: "3." loses its full stop and ".5" keeps it.
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # at most so many are dropped: the official code passes a flag of that value as the count

# Contractions of which the official table knows the form without its apostrophe ...
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll
ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're
why's won't would've wouldn't y'all you'd you'll you're you've
"""
# ... and those of which it knows each form that lacks one of two.
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've
they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _without_each(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {
    **{lacking: word for word in (_ONE_APOSTROPHE + _TWO_APOSTROPHES).split() for lacking in _without_each(word)},
    **dict.fromkeys(_without_each("'ow's'at"), "'ow's'at"),
    **dict.fromkeys(_without_each("y'all'd've"), "y'all'd've"),
    "somebody'd": "somebodyd",  # as the official table has it
}


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """As the official evaluation of VQAv2 gives it.

    For every reference left out in turn: how many of the others are the answer, a third of it, at most 1; the mean of that.
    Of ten references, three that agree make 0.9 and four 1.0. Texts are normalised unless all references are the same as
    they stand. A single reference, of which no other is left, must be the answer, both normalised.
    """
    said, given = _plain(answer), [_plain(reference) for reference in references]
    if len(given) == 1:
        return float(normalised(said) == normalised(given[0]))
    if len(set(given)) > 1:
        said, given = normalised(said), [normalised(reference) for reference in given]
    return _agreement(said, given)


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy as the server of TextVQA gives it: in lower case, without commas and question marks, `'s` a word of its
    own, and always normalised. A single reference must be the answer."""
    said, given = _textvqa(answer), [_textvqa(reference) for reference in references]
    return float(said == given[0]) if len(given) == 1 else _agreement(said, given)


def _agreement(said: str, given: Sequence[str]) -> float:
    matches = sum(said == reference for reference in given)
    return sum(min(1.0, (matches - (said == left)) / 3) for left in given) / len(given) if given else 0.0


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _textvqa(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalised(_plain(text))


def normalised(text: str) -> str:
    """A text as the official evaluation of VQA compares it: punctuation, then number words, articles and contractions."""
    left = text
    in_number = _NUMBER_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        alone = mark + " " in text or " " + mark in text
        left = left.replace(mark, "" if alone or in_number else " ")
    left = _FULL_STOP.sub("", left, count=_FULL_STOPS)
    words = [_DIGITS.get(word, word) for word in left.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
