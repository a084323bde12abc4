"""Micro-batches on the device, the next one copied there beside the compute of the current one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from m4train.batch import PackedBatch


def on_device(batches: Sequence[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """The batches in order, on `device`; on CUDA each is copied on a stream of its own while the one before it runs."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    ahead = _copy(batches[0], device, stream) if batches else None
    for number in range(len(batches)):
        assert ahead is not None
        torch.cuda.current_stream(device).wait_stream(stream)
        current, ahead = ahead, None
        if number + 1 < len(batches):
            ahead = _copy(batches[number + 1], device, stream)
        yield current


def _copy(batch: PackedBatch, device: torch.device, stream: torch.cuda.Stream) -> PackedBatch:
    """Starts the copy. It waits for the compute issued so far, since it may be given memory that compute has just freed."""
    pinned = batch.pin_memory()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        return pinned.to(device, non_blocking=True)
