"""Micro-batches on the device, the next one copied there during the compute of the current one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from m4train.batch import PackedBatch


def on_device(batches: Sequence[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """The batches in order, on `device`; on CUDA each is copied on a stream of its own while the one before it runs."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream, compute = _copy_stream(device), torch.cuda.current_stream(device)
    ahead = _copy(batches[0], device, stream) if batches else None
    for number in range(len(batches)):
        assert ahead is not None
        compute.wait_stream(stream)
        current, ahead = ahead, None
        current.record_stream(compute)
        if number + 1 < len(batches):
            ahead = _copy(batches[number + 1], device, stream)
        yield current


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all copies, so that they wait for each other and for nothing else: the first batch of a step is copied
    while the device still computes the step before."""
    return torch.cuda.Stream(device)


def _copy(batch: PackedBatch, device: torch.device, stream: torch.cuda.Stream) -> PackedBatch:
    with torch.cuda.stream(stream):
        return batch.pin_memory().to(device, non_blocking=True)
