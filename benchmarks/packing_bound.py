"""How full packs could be at best: the configuration LP of all documents at once, by column generation.

    PYTHONPATH=. python benchmarks/packing_bound.py 10

No packer, with whatever pool, needs fewer packs than the LP's value. Columns (ways to fill one pack) are priced by a
two-dimensional knapsack; the value is bounded from below at every iteration (Farley, 1990). Token counts are rounded down to
multiples of `GRAIN`, which makes the bound a little too generous and never too strict.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csc_matrix

from tests.unit.data.plan.test_packing import obelics_lengths

TOKENS, GRAIN, GAP = 4096, 8, 1.001
Pattern = dict[int, int]  # how many documents of each kind a pack holds


class Kinds:
    """The distinct (rounded tokens, frames) among the documents that fit, and how many of each there are."""

    def __init__(self, lengths: list[tuple[int, int]], frames: int) -> None:
        counted = Counter((tokens // GRAIN, images) for tokens, images in lengths)
        self.tokens, self.frames = (np.array([kind[axis] for kind in counted]) for axis in (0, 1))
        self.number = np.array(list(counted.values()), float)
        self.budgets = TOKENS // GRAIN, frames

    def best_packs(self, worth: np.ndarray) -> tuple[float, list[Pattern]]:
        """The largest worth of one pack, and a few packs of nearly that worth."""
        tokens, frames = self.budgets
        best, choice = np.zeros((tokens + 1, frames + 1)), np.full((tokens + 1, frames + 1), -1)
        room = np.arange(frames + 1)
        for size in range(1, tokens + 1):
            best[size] = best[size - 1]
            fit = np.flatnonzero(self.tokens <= size)
            if not len(fit):
                continue
            left = room - self.frames[fit, None]
            values = np.take_along_axis(best[size - self.tokens[fit]], np.maximum(left, 0), 1) + worth[fit, None]
            values[left < 0] = -1
            top = values.argmax(0)
            better = values[top, room] > best[size]
            best[size][better], choice[size][better] = values[top, room][better], fit[top[better]]
        ends = [(tokens - short, frames - few) for few in range(min(4, frames)) for short in (0, 1, 3, 8)]
        return best[tokens, frames], [self._pack(choice, *end) for end in ends]

    def _pack(self, choice: np.ndarray, size: int, room: int) -> Pattern:
        pack: Counter[int] = Counter()
        while size > 0:
            kind = int(choice[size, room])
            if kind < 0:
                size -= 1
                continue
            pack[kind] += 1
            size, room = size - self.tokens[kind], room - self.frames[kind]
        return dict(pack)


def fewest_packs(kinds: Kinds) -> float:
    """A number of packs that is never above what any packing needs."""
    tokens, frames = kinds.budgets
    alone = np.minimum(tokens // np.maximum(kinds.tokens, 1), frames // np.maximum(kinds.frames, 1))
    packs: list[Pattern] = [{kind: int(times)} for kind, times in enumerate(alone)]
    bound, generator = 0.0, np.random.default_rng(0)
    while True:
        starts = np.cumsum([0, *(len(pack) for pack in packs)])
        rows = [kind for pack in packs for kind in pack]
        matrix = csc_matrix(([n for p in packs for n in p.values()], rows, starts), shape=(len(alone), len(packs)))
        solved = linprog(np.ones(len(packs)), A_ub=-matrix, b_ub=-kinds.number, method="highs")
        worth = -solved.ineqlin.marginals
        largest, found = kinds.best_packs(worth)
        bound = max(bound, float(worth @ kinds.number) / max(1.0, largest))
        if solved.fun <= bound * GAP:
            return bound
        for _ in range(4):  # packs of a random half of the kinds: many columns an iteration, so that there are few
            found += kinds.best_packs(np.where(generator.random(len(worth)) < 0.5, worth, -1.0))[1]
        new = {tuple(sorted(p.items())): p for p in found if sum(worth[kind] * n for kind, n in p.items()) > 1 + 1e-9}
        packs += new.values()


def main() -> None:
    for frames in map(int, sys.argv[1:]):
        fitting = [(t, f) for t, f in obelics_lengths(10_000) if t <= TOKENS and f <= frames]
        packs = fewest_packs(Kinds(fitting, frames))
        used = np.sum(fitting, axis=0) / (TOKENS, frames) / packs
        print(
            f"{TOKENS} tokens, {frames} frames: at most {used[0]:.2%} of the tokens and {used[1]:.2%} of the frames",
            flush=True,
        )


if __name__ == "__main__":
    main()
