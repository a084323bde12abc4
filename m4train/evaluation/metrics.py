"""Scores of a generated answer against its reference."""

from __future__ import annotations


def exact_match(answer: str, reference: str) -> float:
    """1.0 where the two are equal but for runs of white space and its presence at either end, else 0.0."""
    return float(answer.split() == reference.split())
