"""How surprising a text is to a small model of word trigrams trained on reference texts, or to a KenLM model.

The own model counts n-grams by hash in fixed tables, so that its memory does not depend on its corpus. The probability of a word
mixes what is known of its trigram, bigram and frequency (Jelinek and Mercer 1980):
p(w | u v) = 0.6 c(uvw)/c(uv) + 0.3 c(vw)/c(v) + 0.1 (c(w) + 1)/(N + V). Its perplexities are not those of KenLM: look at the
histogram of your corpus before you set a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from data_pipelines.corpus.measures import Text, words_of
from m4train.config.packages import need
from m4train.errors import ConfigError

_WEIGHTS = (0.1, 0.3, 0.6)  # of frequency, bigram and trigram
_BITS = 22  # log2 of the entries of a table
_MIX = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(1 << 17)
def _hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def _grams(words: Sequence[str], order: int) -> np.ndarray:
    """(T,) a hash of every word with the `order` - 1 words before it, where the text begins with two marks."""
    marked = np.fromiter((_hash(word) for word in ("\0", "\0", *words)), np.uint64, len(words) + 2)
    found = np.zeros(len(words), np.uint64)
    for back in range(order - 1, -1, -1):
        found = (found ^ marked[2 - back : len(marked) - back]) * _MIX
        found ^= found >> np.uint64(29)
    return found


class NgramModel:
    """Counts of words, bigrams and trigrams of reference texts."""

    def __init__(self, bits: int = _BITS) -> None:
        self._mask = np.uint64((1 << bits) - 1)
        self._counts = [np.zeros(1 << bits, np.uint32) for _ in range(3)]
        self._total = self._texts = self._vocabulary = 0

    @classmethod
    def trained(cls, texts: Iterable[str], bits: int = _BITS) -> NgramModel:
        model = cls(bits)
        for text in texts:
            model._add(words_of(text))
        if not model._total:
            raise ConfigError("the reference texts of the perplexity filter hold no word: name others.")
        model._vocabulary = int(np.count_nonzero(model._counts[0]))
        return model

    def _add(self, words: Sequence[str]) -> None:
        """Counts the words of one text."""
        for order, counts in enumerate(self._counts, 1):
            np.add.at(counts, _grams(words, order) & self._mask, 1)
        self._total += len(words)
        self._texts += 1

    def perplexity(self, text: Text) -> float:
        """The exponential of the mean surprise of a word; infinite for a text without words."""
        if not text.words:
            return math.inf
        seen = [
            counts[_grams(text.words, order) & self._mask].astype(np.float64)
            for order, counts in enumerate(self._counts, 1)
        ]
        chance = _WEIGHTS[0] * (seen[0] + 1) / (self._total + self._vocabulary)
        for order in (
            1,
            2,
        ):  # the context of a word's bigram is the word before it, that of its trigram the bigram before
            before = np.concatenate([[self._texts], seen[order - 1][:-1]])
            if order == 2:
                before[1:2] = np.minimum(before[1:2], self._texts)
            known = np.divide(seen[order], before, out=np.zeros_like(before), where=before > 0)
            chance += _WEIGHTS[order] * np.minimum(known, 1)
        return float(np.exp(-np.log(chance).mean()))


def perplexity_measure(path: str | None, reference: Sequence[str] | None) -> Callable[[Text], float]:
    """The measure of a KenLM model (`path`, .arpa or .bin), or of a model trained on the files `reference`.

    Raises ConfigError if there is neither.
    """
    if path:
        return _kenlm(path)
    if not reference:
        raise ConfigError(
            "filters.document.perplexity needs a model: set filters.models.perplexity to a KenLM file, "
            "filters.models.reference to texts like those that are wanted, or filters.document.perplexity=off."
        )
    return _trained(tuple(reference)).perplexity


@lru_cache(2)
def _trained(files: tuple[str, ...]) -> NgramModel:
    return NgramModel.trained(reference_texts(files))


def _kenlm(path: str) -> Callable[[Text], float]:
    need("kenlm", "filters.models.perplexity")
    import kenlm

    if not Path(path).is_file():
        raise ConfigError(f"filters.models.perplexity={path} does not exist: name a KenLM model.")
    model = kenlm.Model(path)
    return lambda text: model.perplexity(" ".join(text.words)) if text.words else math.inf


def reference_files(path: str) -> list[str]:
    """The text files that a path to one, or to a folder of them, names. Raises ConfigError if there are none."""
    place = Path(path)
    found = sorted(place.rglob("*.txt*")) if place.is_dir() else [place] if place.is_file() else []
    if not found:
        raise ConfigError(f"filters.models.reference={path} is neither a text file nor a folder of .txt files.")
    return [str(each) for each in found]


def reference_texts(files: Iterable[str]) -> Iterable[str]:
    """Paragraphs of text files, packed by gzip or not."""
    import gzip

    for path in files:
        read = gzip.open if path.endswith(".gz") else open
        with read(path, "rt", encoding="utf-8", errors="replace") as file:
            yield from file.read().split("\n\n")
