"""Floating-point operations of training, per part of the model, and the share of the hardware's peak they use."""

from __future__ import annotations

import resource
from collections import defaultdict

import torch

from m4train.batch import PackedBatch
from m4train.gpus import GPUS, named
from m4train.parts import CROSS_ATTENTION, EMBEDDINGS, LM_HEAD, NEW_TOKENS, TEXT
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_parameters, is_adapter, part_of

_TABLES = (EMBEDDINGS, NEW_TOKENS)  # looked up, not multiplied
_DECODER = (TEXT, CROSS_ATTENTION)  # layers that take turns


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 operations per second of a device, if it is known."""
    if device.type != "cuda":
        return None
    name = named(torch.cuda.get_device_name(device))
    return None if name is None else GPUS[name].flops


class Throughput:
    """Counts the operations of forward and backward passes of this rank; recomputation is not counted as work.

    The backward pass of a part costs one forward for the gradients of its inputs, if something before it trains, and
    one for those of its parameters, if some of them train.
    """

    def __init__(self, model: TrainableModel) -> None:
        self._model = model
        self._factors = pass_factors(model)
        self._counted: dict[str, float] = defaultdict(float)

    def add(self, batch: PackedBatch) -> None:
        """Counts one micro-batch."""
        for part, flops in self._model.flops(batch).items():
            self._counted[part] += flops * self._factors[part]

    def rates(self, seconds: float, device: torch.device) -> dict[str, float]:
        """`tflops` of this rank as a whole and per part since the last call, and `mfu` likewise if the peak is known."""
        counts = {"": float(sum(self._counted.values())), **{f"/{part}": n for part, n in self._counted.items()}}
        self._counted.clear()
        rates = {f"tflops{part}": count / seconds / 1e12 for part, count in counts.items()}
        peak = peak_flops(device)
        shares = {f"mfu{part}": count / seconds / peak for part, count in counts.items()} if peak else {}
        return {**rates, **shares}


def memory_gib(device: torch.device) -> float:
    """The most memory this rank has held at once since the last call: on the device, or, on the CPU, ever resident."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30


def pass_factors(model: TrainableModel) -> dict[str, float]:
    """How many forward passes' worth of operations a step does in each part, in the order of the model's parts."""
    parts = model.parts()
    trained = [name for name, p in canonical_parameters(model).items() if p.requires_grad]
    trains = {part_of(name, parts) for name in trained}
    weighty = {
        part_of(name, parts) for name in trained if not is_adapter(name)
    }  # adapters themselves cost next to nothing
    order = [*model.blocks(), *(part for part in parts if part not in model.blocks())]
    order = [part for part in order if part not in (*_TABLES, LM_HEAD)]
    factors, upstream = {part: 1.0 for part in _TABLES if part in parts}, False
    for part in [*order, LM_HEAD]:
        upstream = upstream or part in trains or (part in _DECODER and bool(trains & {*_TABLES, *_DECODER}))
        tied = part == LM_HEAD and part not in parts and EMBEDDINGS in weighty
        factors[part] = 1.0 + float(part in weighty or tied) + float(upstream)
    return factors
