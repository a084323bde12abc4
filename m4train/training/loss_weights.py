"""How much each loss token counts, by its source and by what its turn says: the objective is a weighted mean, what is logged
stays unweighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from m4train.batch import PackedBatch

_UNIT = 1 << 20  # counts are whole numbers, as ranks add them up: loss tokens in this many parts


class LossWeights:
    """The weight of every source's loss tokens.

    The objective of a step is sum(weight x loss) / sum(weight) over its loss tokens: twice the weight for every source
    changes nothing, and if all weights are equal it is the plain mean.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._equal = len(set(weights.values())) <= 1
        self._tables: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}

    def counts(self, batches: Sequence[PackedBatch]) -> list[int]:
        """Loss tokens of each source by the weights of their turns, in parts, to be summed over ranks; one number if the weights
        of all sources are equal."""
        documents = [document for batch in batches for document in batch.documents]
        if self._equal:
            lost = sum(d.loss_tokens - d.loss_weight for d in documents if d.loss_weight is not None)
            return [round((sum(batch.loss_tokens for batch in batches) - lost) * _UNIT)]
        counts = dict.fromkeys(self._weights, 0.0)
        for document in documents:
            counts[document.source] += document.loss_tokens if document.loss_weight is None else document.loss_weight
        return [round(count * _UNIT) for count in counts.values()]

    def total(self, counts: Sequence[int]) -> float:
        """What the sum of losses of the step is divided by, from the `counts` of all ranks; never zero."""
        weights = [1.0] if self._equal else self._weights.values()
        return sum(weight * (count / _UNIT) for weight, count in zip(weights, counts, strict=True)) or 1.0

    def weighted(self, batch: PackedBatch) -> PackedBatch:
        """The batch with `target_weights`, on its device."""
        if self._equal:
            return batch
        assert batch.target_sources is not None
        place = batch.device, batch.source_names
        if place not in self._tables:
            self._tables[place] = torch.tensor([self._weights[name] for name in place[1]], device=place[0])
        weights = self._tables[place][batch.target_sources]
        if batch.target_weights is not None:
            weights = weights * batch.target_weights
        return replace(batch, target_weights=weights)
