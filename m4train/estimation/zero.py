"""ZeRO-1 and 2 as DeepSpeed runs them, over fake tensors and without other ranks."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from m4train.config import Config
from m4train.config.deepspeed import deepspeed_config
from m4train.estimation.engines import FakeSingle
from m4train.training import optim


class FakeZero(FakeSingle):
    """The rank that holds most. Under ZeRO-1 gradients stay with their parameters until the last backward pass of a step is done;
    under ZeRO-2 they move into a bucket as soon as they are there. A full bucket is copied once more to be reduced, and of that
    this rank keeps its part, in which a parameter that ranks share is whole."""

    def __init__(self, config: Config, ranks: int) -> None:
        super().__init__(config, "cpu")
        settings = deepspeed_config(config, ranks)["zero_optimization"]
        self._ranks, self._size = ranks, int(settings["reduce_bucket_size"])
        self._buffers = 2 if settings["overlap_comm"] else 1
        self._divided, self._offload = config.engine.name == "zero2", config.engine.offload
        self._bucket: list[Tensor] = []
        self._filled = 0  # elements of it
        self._waiting: list[nn.Parameter] = []  # whose gradient is larger than a bucket
        self._part: Tensor | None = None  # of this backward pass
        self._kept: Tensor | None = None  # of all of a step

    def optimise(self, trainable: dict[str, nn.Parameter], updated: dict[str, nn.Parameter] | None = None) -> None:
        """The optimizer works on a flat copy of this rank's share of each group."""
        self.trainable = trainable
        groups = optim.parameter_groups(
            trainable, optim.undecayed_names(self.model), self.model.parts(), self.config.optimizer
        )
        counts = [[p.numel() for p in group["params"]] for group in groups]
        self._own = max(sum(_overlapping(each, self._ranks, rank) for each in counts) for rank in range(self._ranks))
        for group, each in zip(groups, counts, strict=True):
            group["params"] = [nn.Parameter(torch.empty(-(-sum(each) // self._ranks)))]
        self.optimizer = optim.build_optimizer(groups, self.config.optimizer)
        for parameter in trainable.values():
            parameter.register_post_accumulate_grad_hook(self._ready)

    def kinds(self) -> dict[str, list[Tensor]]:
        kinds = {"master": [flat for group in self.optimizer.param_groups for flat in group["params"]]}
        if self._offload:  # gradients of this rank's share, and one on its way there
            largest = max(p.numel() for p in self.trainable.values())
            kinds |= {"offloaded": [torch.empty(self._own)], "buckets": [torch.empty(largest)]}
        return kinds

    def _ready(self, parameter: nn.Parameter) -> None:
        if not self._bucket:
            self._bucket = [torch.empty(self._size) for _ in range(self._buffers)]
            self.hold("buckets", self._bucket)
        if self._divided:
            self._enter(parameter)

    def _enter(self, parameter: nn.Parameter) -> None:
        """Moves a gradient into the bucket."""
        if self._filled + parameter.numel() > self._size:
            self._reduce()
        self._filled += parameter.numel()
        if parameter.numel() > self._size:
            self._waiting.append(parameter)
        else:
            parameter.grad = None

    def _reduce(self) -> None:
        torch.empty(self._filled)
        if self._part is None and not self._offload:
            self._part = torch.empty(self._own)
            self.hold("gradients", [self._part])
        for parameter in self._waiting:
            parameter.grad = None
        self._filled, self._waiting = 0, []

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`; `loss` ()."""
        super().backward(loss, last)
        if not self._divided and not last:
            return
        for parameter in self.trainable.values():
            if parameter.grad is not None and all(parameter is not other for other in self._waiting):
                self._enter(parameter)
        self._reduce()
        if self._kept is None:
            self._kept = self._part
        self._part = None
        self._bucket = []

    def update(self, factor: float, max_norm: float) -> Any:
        """Group after group; on the host if it is there."""
        if not self._offload:
            for group in self.optimizer.param_groups:
                (flat,) = group["params"]
                flat.grad = torch.empty_like(flat)
                self.optimizer.step()
                flat.grad = None
        self._kept = None


def _overlapping(counts: list[int], ranks: int, rank: int) -> int:
    """Elements of the parameters, laid one after the other and cut into equal parts, of which the part of `rank` holds some."""
    each = -(-sum(counts) // ranks)
    ends = list(accumulate(counts))
    return sum(n for n, end in zip(counts, ends, strict=True) if end > rank * each and end - n < (rank + 1) * each)
