"""What filters measure of a text: each number once, from words that are cut out once.

Definitions are those of OBELICS (Laurençon et al. 2023, arXiv:2306.16527, appendix A.3): words are what stands between white
space, in lower case, without special characters at both ends; special is every character that is not a letter or a mark on one.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

PUNCTUATION = ",;:?!."
CHARACTER_NGRAM, WORD_NGRAM = 10, 5
_LONG = 600  # characters, from which on arrays count n-grams faster than a dictionary
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MARKS = frozenset(PUNCTUATION)
_TOKENS = re.compile(rf"[\w']+|[{PUNCTUATION}]")


@lru_cache(1 << 16)
def is_special(character: str) -> bool:
    """Whether a character is neither a letter nor a mark on one: punctuation, digits, white space, symbols, emoji."""
    return unicodedata.category(character)[0] not in "LM"


@lru_cache(1 << 17)
def stripped(word: str) -> str:
    """A word in lower case without special characters at its ends; empty if it has no others."""
    first, last = 0, len(word)
    while first < last and is_special(word[first]):
        first += 1
    while last > first and is_special(word[last - 1]):
        last -= 1
    return word[first:last].lower()


def words_of(text: str) -> list[str]:
    """The words of a text in order."""
    return [found for word in text.split() if (found := stripped(word))]


@dataclass(frozen=True)
class Text:
    """A text with its words."""

    text: str
    words: list[str] = field(repr=False)

    @classmethod
    def of(cls, text: str) -> Text:
        return cls(text, words_of(text))

    @classmethod
    def joined(cls, parts: Iterable[Text], between: str) -> Text:
        """Texts one after the other: nothing is cut into words again."""
        parts = list(parts)
        return cls(between.join(part.text for part in parts), [word for part in parts for word in part.words])


def word_count(text: Text) -> float:
    return len(text.words)


def character_repetition(text: Text) -> float:
    """Of all 10-grams of characters, the share of the most frequent ones: the root of their number, if so many repeat."""
    size, chars = CHARACTER_NGRAM, text.text
    total = len(chars) - size + 1
    if total < 1:
        return 0.0
    if total < _LONG:
        counts = list(Counter([chars[i : i + size] for i in range(total)]).values())
        repeated = sorted([count for count in counts if count > 1], reverse=True)
        return sum(repeated[: math.isqrt(len(counts))]) / total
    found = _counts_of_ngrams(chars)
    return int(np.sort(found[found > 1])[::-1][: math.isqrt(len(found))].sum()) / total


def _counts_of_ngrams(chars: str) -> np.ndarray:
    """How often each different n-gram of a long text occurs, by a hash of 64 bits: four times as fast as a dictionary of strings."""
    codes = np.frombuffer(chars.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    size = CHARACTER_NGRAM
    hashes = np.zeros(len(codes) - size + 1, np.uint64)
    for place in range(size):
        hashes = hashes * _FACTOR + codes[place : place + len(hashes)]
    return np.unique(hashes * _FACTOR, return_counts=True)[1]


def word_repetition(text: Text) -> float:
    """Of all 5-grams of words, the share that occurs more than once."""
    return repetition(text.words, WORD_NGRAM)


def repetition(words: list[str], size: int) -> float:
    found = Counter(zip(*(words[start:] for start in range(size))))
    return sum(count for count in found.values() if count > 1) / found.total() if found else 0.0


def special_characters(text: Text) -> float:
    """Share of the characters that are special."""
    found = Counter(text.text)
    return sum(count for char, count in found.items() if is_special(char)) / len(text.text) if text.text else 0.0


def punctuation(text: Text) -> float:
    """Share of the tokens, words and marks of punctuation, that are punctuation."""
    return _punctuation(_TOKENS.findall(text.text))


def _punctuation(tokens: list[str]) -> float:
    return sum(map(_MARKS.__contains__, tokens)) / len(tokens) if tokens else 0.0


def punctuation_from(least: int) -> Callable[[Text], float]:
    """As `punctuation`, but 1 for texts of fewer tokens than `least`, of which it says nothing."""

    def measure(text: Text) -> float:
        tokens = _TOKENS.findall(text.text)
        return _punctuation(tokens) if len(tokens) >= least else 1.0

    return measure


def share_in(listed: Collection[str]) -> Callable[[Text], float]:
    """The share of a text's words that are listed; 0 of a text without words."""

    def measure(text: Text) -> float:
        return sum(map(listed.__contains__, text.words)) / len(text.words) if text.words else 0.0

    return measure


@lru_cache(8)
def word_lists(path: str | None = None) -> Mapping[str, frozenset[str]]:
    """Lists of words by name: `stop`, `flagged` and `spam`, of English if no other YAML file is named."""
    file = Path(path) if path else Path(__file__).with_name("words_en.yaml")
    lists = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: frozenset(str(words).split()) for name, words in lists.items()}


def common_words(texts: Iterable[str], least: int = 2) -> frozenset[str]:
    """The words that occur at least so often in reference texts."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(words_of(text))
    return frozenset(word for word, count in found.items() if count >= least)
