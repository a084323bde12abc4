"""Notices what makes the host wait for the device, or copies between the two, also where tensors are fake and no device is there."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their result is a number, or has a shape, that only the device knows.
DATA_DEPENDENT = (
    "aten._local_scalar_dense",
    "aten.nonzero.",
    "aten.masked_select",
    "aten._unique",
    "aten.unique_",
    "aten.equal",
    "aten.is_nonzero",
    "aten.repeat_interleave.Tensor",
    "aten.bincount",
)


class Synchronisations(TorchDispatchMode):
    """While it is entered, `found` collects such operations with the line of m4train that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls: list[str] = []  # every operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if not name.startswith("prim."):  # a look at the tensor itself
            self.calls.append(name)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name.startswith(DATA_DEPENDENT) and kwargs.get("output_size") is None:
            self._note(name)
        if name.startswith(("aten.index.", "aten.index_put", "aten._index_put")) and _by_mask(args[1]):
            self._note(f"{name} by a mask")
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name.startswith(("aten._to_copy", "aten.copy", "aten._copy")) and _devices(given + made) > 1:
            self._note(f"{name} between devices")
        return result

    def _note(self, what: str) -> None:
        lines = [frame for frame in traceback.extract_stack() if "/m4train/" in frame.filename]
        where = "" if not lines else f" at {lines[-1].filename.split('/m4train/')[-1]}:{lines[-1].lineno}"
        self.found.append(what + where)


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _devices(tensors: list[Tensor]) -> int:
    return len({tensor.device.type for tensor in tensors})
