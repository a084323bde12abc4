"""CIDEr-D of captions (Vedantam et al., 2015), as the evaluation of COCO captions computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from m4train.evaluation.metrics.ptb import caption_words
from m4train.evaluation.metrics.said import Said, Scores, half_width

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of the penalty on the difference of lengths

Ngram = tuple[str, ...]
Weights = list[dict[Ngram, float]]  # one dict for each length of n-gram


def cider(said: Sequence[Said]) -> Scores:
    """How close each caption is to its references, from 0 to 10; 1.0 is published as 100.

    n-grams weigh by how few images have them in their references: the score of a subset is not comparable with that of the
    whole set.
    """
    references = [[_counts(reference) for reference in each.references] for each in said]
    images = Counter(ngram for of_one in references for ngram in set().union(*of_one))
    whole = math.log(len(said)) if said else 0.0
    rarity = {ngram: whole - math.log(count) for ngram, count in images.items()}
    samples = []
    for each, of_one in zip(said, references):
        caption = _counts(each.answer)
        closeness = [_similarity(caption, reference, rarity, whole) for reference in of_one]
        samples.append(10.0 * math.fsum(closeness) / len(closeness))
    value, half = math.fsum(samples) / len(samples), half_width(samples)
    return Scores(samples, value, (value - half, value + half))


def _counts(text: str) -> Counter[Ngram]:
    words = caption_words(text)
    return Counter(
        tuple(words[start : start + n]) for n in range(1, _LONGEST + 1) for start in range(len(words) - n + 1)
    )


def _weights(counts: Counter[Ngram], rarity: dict[Ngram, float], whole: float) -> Weights:
    weights: Weights = [{} for _ in range(_LONGEST)]
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, whole)
    return weights


def _similarity(caption: Counter[Ngram], reference: Counter[Ngram], rarity: dict[Ngram, float], whole: float) -> float:
    # The reference implementation takes the number of bigrams for the length.
    apart = _bigrams(caption) - _bigrams(reference)
    penalty = math.exp(-(apart**2) / (2 * _SIGMA**2))
    total = 0.0
    for ours, theirs in zip(_weights(caption, rarity, whole), _weights(reference, rarity, whole)):
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if norm:
            shared = math.fsum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in ours.keys() & theirs.keys())
            total += shared / norm * penalty
    return total / _LONGEST


def _bigrams(counts: Counter[Ngram]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)
