"""What is measured in a step, summed on the device and reduced over ranks in one reduction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m4train.batch import PackedBatch
from m4train.errors import TrainingError

_SCALARS = ("loss", "loss_tokens", "tokens", "images", "capacity")
_LIMBS = 4  # a 64-bit hash travels as four 16-bit limbs, whose sums over ranks are exact in float64


class StepSums:
    """Sums over the micro-batches of one step of this rank; losses stay on the device until they are read."""

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = list(sources)
        self._slot = {name: i for i, name in enumerate(self.sources)}
        self._device = device
        self._kept: list[tuple[Tensor, Tensor | None, Sequence[str]]] = []  # summed only if somebody asks
        self._host = dict.fromkeys(_SCALARS[1:], 0)
        self._documents = [[0, 0] for _ in self.sources]
        self._hashes = [0, 0]

    def add(self, batch: PackedBatch, token_losses: Tensor) -> None:
        """Adds one micro-batch with its per-token losses (L,); costs no operation on the device until `vector` is asked for."""
        self._kept.append((token_losses, batch.target_sources, batch.source_names))
        self._host["loss_tokens"] += batch.loss_tokens
        self._host["tokens"] += real_tokens(batch)
        self._host["capacity"] += batch.capacity
        self._host["images"] += sum(document.images for document in batch.documents)
        self._hashes[0] += batch.data_hash
        self._hashes[1] += batch.plan_hash
        for document in batch.documents:
            counts = self._documents[self._source(document.source)]
            counts[0] += document.tokens
            counts[1] += document.images

    def _losses(self) -> Tensor:
        """The sum of all losses, then the sum per source, then their numbers."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        by_source = torch.zeros(2, len(self.sources), dtype=torch.float64, device=self._device)
        for token_losses, sources, names in self._kept:
            losses = token_losses.double()
            total += losses.sum()
            if sources is not None and names:
                slots = torch.tensor([self._source(name) for name in names], device=losses.device)
                by_source[0].index_add_(0, slots[sources], losses)
                by_source[1].index_add_(0, slots[sources], torch.ones_like(losses))
        return torch.cat([total.reshape(1), by_source.flatten()])

    def _source(self, name: str) -> int:
        if name not in self._slot:
            raise TrainingError(
                f"A batch holds a document of source {name!r}, but the run has {', '.join(self.sources)}."
            )
        return self._slot[name]

    def vector(self) -> Tensor:
        """Everything as one float64 vector that may be summed over ranks."""
        host = [float(self._host[name]) for name in _SCALARS[1:]]
        limbs = [float(h >> (16 * i) & 0xFFFF) for h in self._hashes for i in range(_LIMBS)]
        documents = [float(count[i]) for i in range(2) for count in self._documents]
        tail = torch.tensor([*host, *limbs, *documents], dtype=torch.float64, device=self._device)
        return torch.cat([self._losses(), tail])

    def read(self, values: Sequence[float]) -> dict[str, float | str]:
        """The metrics of a (reduced) vector."""
        count = len(self.sources)
        losses, loss_tokens = values[1 : 1 + count], values[1 + count : 1 + 2 * count]
        rest = values[1 + 2 * count :]
        host = dict(zip(_SCALARS[1:], rest, strict=False))
        limbs = rest[len(host) : len(host) + 2 * _LIMBS]
        documents = rest[len(host) + 2 * _LIMBS :]
        metrics: dict[str, float | str] = {
            "loss": values[0] / max(1.0, host["loss_tokens"]),
            **{name: int(host[name]) for name in ("tokens", "loss_tokens", "images")},
            "data_hash": _hash(limbs[:_LIMBS]),
            "plan_hash": _hash(limbs[_LIMBS:]),
        }
        if host["capacity"]:
            metrics["padding_fraction"] = 1.0 - host["tokens"] / host["capacity"]
        for i, name in enumerate(self.sources):
            if loss_tokens[i]:
                metrics[f"loss/{name}"] = losses[i] / loss_tokens[i]
            metrics[f"loss_tokens/{name}"] = int(loss_tokens[i])
            metrics[f"tokens/{name}"] = int(documents[i])
            metrics[f"images/{name}"] = int(documents[count + i])
        return metrics


def real_tokens(batch: PackedBatch) -> int:
    """Tokens that belong to a document; an empty batch of weight zero holds filling that belongs to none."""
    return sum(document.tokens for document in batch.documents)


def _hash(limbs: Sequence[float]) -> str:
    return f"{sum(int(limb) << (16 * i) for i, limb in enumerate(limbs)) % 2**64:016x}"
