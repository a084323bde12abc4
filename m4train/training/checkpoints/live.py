"""Whether a checkpoint would hold what the ranks compute with: asked once a start, before its first checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from m4train.errors import CheckpointError
from m4train.training.engines.base import Engine
from m4train.training.tensors import PARAMETER, full

_CHUNK = 2**22  # elements looked at at once
_MODULUS = 2**31 - 1


def check_live(engine: Engine) -> None:
    """Compares a mark of every parameter that a checkpoint would get with that of the live one of every rank; all ranks call it.

    Raises CheckpointError, on every rank, for the first that differs: an option of the engine has mixed them up.
    """
    kept = {name: tensor for name, tensor in engine.tensors().items() if name.startswith(PARAMETER)}
    stored = {name.removeprefix(PARAMETER): mark(full(tensor)) for name, tensor in kept.items()}
    live = {name: mark(tensor) for name, tensor in engine.live_parameters()}
    wrong = None
    for rank, marks in enumerate(engine.gather(live)):
        wrong = wrong or next((f"{name} of rank {rank}" for name in marks if marks[name] != stored[name]), None)
    wrong = engine.broadcast(wrong)
    if wrong is not None:
        raise CheckpointError(
            f"Parameter {wrong} is not what the engine would write into the checkpoint: nothing is saved, since it would be wrong; "
            "leave out options of engine.deepspeed, or choose another engine."
        )


def mark(tensor: Tensor) -> int:
    """A number that changes with any value of a tensor, and with their order; the same on every device."""
    flat = tensor.detach().reshape(-1)
    words = flat.float().view(torch.int32) if flat.is_floating_point() else flat
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long() % _MODULUS
        places = torch.arange(start, start + len(part), device=part.device) % 65_521 + 1
        total = (total * 31 + (part * places % _MODULUS).sum()) % _MODULUS
    return int(total)
