"""Counts the bytes that tensors hold, by what they are for, and remembers the moment when they were most."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m4train.training.tensors import local

PHASES = ("activations", "passing")  # what the forward pass makes, and what comes after it

# What an operation allocates and frees inside itself, which no dispatch mode sees, in bytes by its arguments.
_WORKSPACE: dict[Any, Callable[..., int]] = {
    torch.ops.aten.logsumexp: lambda values, *_: values.numel() * values.element_size()
}

# What FSDP2's own operations write into, by the place or name of the argument.
_WRITTEN: dict[str, tuple[int | str, str]] = {
    "fsdp::all_gather_copy_in": (1, "gathered"),
    "fsdp::split_with_sizes_copy": ("out", "gathered"),
    "fsdp::chunk_cat": ("out", "buckets"),
    "c10d::_reduce_scatter_base_": (0, "gradients"),
}


def _nothing(*_: Any) -> int:
    return 0


@dataclass
class _Held:
    kind: str
    size: int
    reference: weakref.ref[torch.UntypedStorage]  # kept, since a reference that is gone tells nobody


class MemoryTracker(TorchDispatchMode):
    """While it is entered, every new storage counts under `phase` until it is freed.

    torch.distributed._tools.mem_tracker does the like per module, but refuses models with frozen parameters (torch 2.13).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports torch's compiler, a second before the first step of a run

    def __init__(self) -> None:
        super().__init__()
        self.phase = "activations"
        self.held: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._live: dict[int, _Held] = {}  # by the address of the storage object
        self.working = 0  # the most that was held besides what `hold` was told of
        self._most = 0

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that exist already, or that count as something else so far, as `kind`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._live.get(id(storage))
            if known is None:
                self._take(kind, storage)
            else:
                self.held[known.kind] -= known.size
                known.kind = kind
                self.held[kind] = self.held.get(kind, 0) + known.size

    def gradients_of(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts what these accumulate as gradients from the moment on when it is complete."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._complete)

    def _complete(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # an engine has taken it away
            self.hold("gradients", [local(parameter.grad)])

    def _take(self, kind: str, storage: torch.UntypedStorage) -> None:
        address, size = id(storage), storage.nbytes()
        self._live[address] = _Held(kind, size, weakref.ref(storage, lambda _: self._free(address)))
        self.held[kind] = self.held.get(kind, 0) + size

    def _free(self, address: int) -> None:
        freed = self._live.pop(address)
        self.held[freed.kind] -= freed.size

    def __enter__(self) -> MemoryTracker:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(
            storage, size
        )  # no operation: FSDP2 frees so
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize

    def _resized(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = self._resize(storage, size)
        if (known := self._live.get(id(storage))) is not None:
            self.held[known.kind] += size - known.size
            known.size = size
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if (known := _WRITTEN.get(func.overloadpacket._qualified_op_name)) is not None:
            written = args[known[0]] if isinstance(known[0], int) else kwargs[known[0]]
            self.hold(known[1], tree_leaves(written))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._live:
                    self._take(self.phase, storage)
        inside = _WORKSPACE.get(func.overloadpacket, _nothing)(*args)
        total = sum(self.held.values()) + inside
        self.working = max(self.working, sum(self.held.get(phase, 0) for phase in PHASES) + inside)
        if total > self._most:
            self._most, self.peak = total, dict(self.held)
            self.peak[self.phase] = self.peak.get(self.phase, 0) + inside
        return results
