"""Scores that compare an answer, as a text or a number, with its references."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m4train.evaluation.metrics.said import Said, Scores, half_width, mean_scores

ANLS_THRESHOLD = 0.5
RELATIVE_ERROR = 0.05


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, apart from how much white space there is, else 0.0."""
    return float(any(answer.split() == reference.split() for reference in references))


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity as the server of DocVQA and InfographicVQA gives it.

    To the nearest reference: 1 - edits / length of the longer one as they stand; 0 below a half. Case and runs of white space
    make no edits, but count in the lengths.
    """
    best = max((_similarity(answer, reference) for reference in references), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(answer: str, reference: str) -> float:
    longest = max(len(answer.upper()), len(reference.upper()))
    return 1.0 - edits(_plain(reference), _plain(answer)) / longest if longest else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def edits(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions of a character."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (one != other)))
    return row[-1]


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """Of ChartQA: numbers may be off by 5 %, other answers must be the reference but for case. "12%" is 0.12; texts with a
    comma or a currency are not numbers; a reference of 0 is compared as a text."""
    return float(any(_near(answer, reference) for reference in references))


def _near(answer: str, reference: str) -> bool:
    said, right = _number(answer), _number(reference)
    if said is not None and right:
        return abs(said - right) / abs(right) <= RELATIVE_ERROR
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def ocrbench(said: Sequence[Said]) -> Scores:
    """Hits: a reference is contained in the answer, both in lower case; handwritten formulas (`dataset` HME100k) with their case
    and without spaces. The published score is the number of hits of 1,000 questions."""
    samples = [float(_contains(each)) for each in said]
    return mean_scores(samples, {"hits": int(sum(samples))})


def _contains(said: Said) -> bool:
    def plain(text: str) -> str:
        if said.about.get("dataset") == "HME100k":
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    return any(plain(reference) in plain(said.answer) for reference in said.references)


def perplexity(said: Sequence[Said]) -> Scores:
    """exp(loss a token) of the references, from `loss`, the sum over the `tokens` of each; a sample's score is its own loss a
    token. The interval is that of the ratio of both sums."""
    losses = [float(each.about["loss"]) for each in said]
    tokens = [float(each.about["tokens"]) for each in said]
    mean = math.fsum(losses) / math.fsum(tokens)
    size = math.fsum(tokens) / len(tokens)
    half = half_width([(loss - mean * count) / size for loss, count in zip(losses, tokens)])
    samples = [loss / count for loss, count in zip(losses, tokens)]
    bounds = (math.exp(mean - half), _exp(mean + half))
    return Scores(samples, math.exp(mean), bounds, shown_times=1.0)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
