"""Which source the next sample comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from m4train.config import MixtureConfig
from m4train.data.source import Source
from m4train.errors import ConfigError


class Shares:
    """Deals to sources so that at any prefix each has its share of the amount, within one sample of it.

    The rule is that of worst-case fair weighted queueing (Bennett and Zhang 1996): among the sources that do not have more than
    their share, the one whose next sample would be due first. An amount is whatever `add` is told: 1 for a sample, its
    tokens, its tokens with a loss, or its images. When a source ends, or the weights change, counting begins again from zero.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self.amounts = dict.fromkeys(weights, 0)

    def next(self, sizes: Mapping[str, int]) -> str:
        """The source to draw from; `sizes` are the amounts of the next sample of every source left."""
        if len(sizes) == 1:
            return next(iter(sizes))
        total = sum(self._weights[name] for name in sizes)
        have = sum(self.amounts[name] for name in sizes)
        due = {
            name: (self.amounts[name] + size) * total / self._weights[name]
            for name, size in sizes.items()
            if self.amounts[name] * total <= self._weights[name] * have * (1 + 1e-12)
        }
        return min(due, key=due.__getitem__)

    def add(self, name: str, size: int) -> None:
        self.amounts[name] += size

    def restart(self, weights: Mapping[str, float] | None = None) -> None:
        """Counts again from zero, with other weights if they are given."""
        self._weights = dict(weights or self._weights)
        self.amounts = dict.fromkeys(self._weights, 0)


def check_mixture(sources: Sequence[Source], mixture: MixtureConfig) -> None:
    """Raises ConfigError for weights, units or schedules that cannot work, naming the key."""
    names = {source.name for source in sources}
    for source in sources:
        if not source.config.weight > 0:
            raise ConfigError(f"data.sources.{source.name}.weight is {source.config.weight}, but must be positive.")
        if mixture.by == "images" and not source.index.images_total:
            raise ConfigError(
                f"data.mixture.by=images cannot give source {source.name!r} a share: it holds no image; "
                "use tokens or samples."
            )
    for step, weights in mixture.schedule.items():
        unknown = set(weights) - names
        if unknown or step < 1 or not all(weight > 0 for weight in weights.values()):
            raise ConfigError(
                f"data.mixture.schedule[{step}] is {dict(weights)}: it must give positive weights of the sources "
                f"{', '.join(sorted(names))} from a step of at least 1 on."
            )


def weights_at(step: int, sources: Sequence[Source], mixture: MixtureConfig) -> dict[str, float]:
    """The weight of each source in step `step`, which need not sum to anything.

    A source's own weight, or the last one the schedule gave it; with a temperature T, times its size to the power 1/T.
    """
    weights = {source.name: source.config.weight for source in sources}
    for start in sorted(mixture.schedule):
        if start <= step:
            weights |= mixture.schedule[start]
    if mixture.temperature is not None:
        for source in sources:
            weights[source.name] *= source_size(source, mixture.by) ** (1.0 / mixture.temperature)
    return weights


def source_size(source: Source, by: str) -> int:
    """How many samples, tokens or images a source holds."""
    if by == "samples":
        return len(source) - source.index.bad_count
    if by == "images":
        return source.index.images_total
    return int(source.index.lengths.sum(dtype="int64"))
