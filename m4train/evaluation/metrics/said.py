"""What a metric is given, one `Said` an answer, and what it returns, with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Z95 = 1.959963984540054  # half the width of a 95 % interval, in standard errors


@dataclass(frozen=True)
class Said:
    """One answer with what it is scored by."""

    answer: str
    references: tuple[str, ...]  # the answers that count as right; of multiple choice the letter
    question: str = ""
    key: str = ""
    options: tuple[str, ...] = ()  # of multiple choice, in the order of their letters
    about: Mapping[str, Any] = field(default_factory=dict)  # further fields of the record, such as its category


@dataclass(frozen=True)
class Scores:
    """Of all answers of a source: one score a sample, and the number that is reported."""

    samples: list[float]  # in the order of the answers
    value: float
    interval: tuple[float, float]  # 95 %
    shown_times: float = 100.0  # what `value` is multiplied by where it is shown
    counts: dict[str, int] = field(default_factory=dict)  # such as unparsed
    others: dict[str, float] = field(default_factory=dict)  # further aggregates by name


Metric = Callable[[Sequence[Said]], Scores]
PerAnswer = Callable[[str, Sequence[str]], float]


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean: 1.96 standard deviations / sqrt(n); infinite for a single value."""
    count = len(values)
    if count < 2:
        return math.inf
    mean = math.fsum(values) / count
    return Z95 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def mean_scores(samples: list[float], counts: Mapping[str, int] | None = None, **others: Any) -> Scores:
    """The scores whose aggregate is their mean."""
    value = math.fsum(samples) / len(samples) if samples else math.nan
    half = half_width(samples)
    return Scores(samples, value, (value - half, value + half), counts=dict(counts or {}), **others)


def per_answer(function: PerAnswer) -> Metric:
    """The metric that scores every answer by itself with `function(answer, references)` and takes the mean."""

    def metric(said: Sequence[Said]) -> Scores:
        return mean_scores([float(function(each.answer, each.references)) for each in said])

    return metric
