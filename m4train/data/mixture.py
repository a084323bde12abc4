"""Which source the next sample comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Mixture:
    """Deals samples to sources so that at any prefix each has its share, less than one sample too many or too few.

    Dealing is earliest deadline first: sample number j of a source with share w may come at draw (j - 1) / w and must come
    by draw j / w. This is the chairman assignment problem (Tijdeman 1980). When a source ends, the others continue with
    their shares of what is left, counted anew.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._drawn = dict.fromkeys(weights, 0)

    @property
    def active(self) -> list[str]:
        return list(self._drawn)

    def next(self) -> str:
        """The source of the next draw."""
        total = sum(self._weights[name] for name in self._drawn)
        draws = sum(self._drawn.values())
        chosen, earliest = "", float("inf")
        for name, drawn in self._drawn.items():
            share = self._weights[name] / total
            deadline = (drawn + 1) / share
            if drawn < share * (draws + 1) - 1e-9 and deadline < earliest:
                chosen, earliest = name, deadline
        self._drawn[chosen] += 1
        return chosen

    def end(self, name: str) -> None:
        """Takes out a source that has no more samples."""
        del self._drawn[name]
        self._drawn = dict.fromkeys(self._drawn, 0)

    def state(self) -> dict[str, Any]:
        return dict(self._drawn)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._drawn = {name: int(drawn) for name, drawn in state.items()}
