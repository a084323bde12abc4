"""The most bytes that tensors really hold on a device while something runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from m4train.estimation.tracker import MemoryTracker
from m4train.training.tensors import local


class Peak:
    """Measures between `begin` and `end`. On a GPU its allocator knows; on a CPU every operation is watched, and what it makes is
    added to what is held at `begin`: `own` tensors, and floating-point ones that were made since this object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._others = {} if device.type == "cuda" else {id(t): weakref.ref(t) for t in _tensors()}
        self._tracker: MemoryTracker | None = None

    def begin(self, own: Iterable[Tensor]) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        made = (t for t in _tensors() if t.is_floating_point() and not self._is_others(t))  # no batches that wait
        self._tracker = MemoryTracker()
        self._tracker.hold("held", (*map(local, own), *made))
        self._tracker.__enter__()

    def end(self) -> tuple[float, float]:
        """Bytes that tensors held at most, and what the allocator had taken from the device for them."""
        if self._device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
            return float(most[0]), float(most[1])
        assert self._tracker is not None  # begin comes first
        found = float(sum(self._tracker.peak.values()))
        self.drop()
        return found, found

    def drop(self) -> None:
        """Ends without a result."""
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self._tracker = None

    def _is_others(self, tensor: Tensor) -> bool:
        known = self._others.get(id(tensor))
        return known is not None and known() is tensor


def _tensors() -> list[Tensor]:
    """All real tensors of this process that Python knows."""
    found = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and type(thing) is not FakeTensor)
    return [
        t
        for t in found
        if t.device.type == "cpu" and t.layout == torch.strided and not is_traceable_wrapper_subclass(t)
    ]
