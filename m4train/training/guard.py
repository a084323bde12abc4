"""Which updates are skipped: those whose gradient norm is not finite, and, if asked, those far outside of the usual."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 128  # accepted norms that say what is usual; before there are as many, no finite norm is an outlier


class StepGuard:
    """Judges gradient norms on the device, without waiting for it.

    A norm is an outlier above mean + `deviations` x standard deviation of the last accepted ones (0: never).
    """

    def __init__(self, deviations: float, device: torch.device) -> None:
        self.deviations = deviations
        self._norms = torch.zeros(WINDOW, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, norm: Tensor) -> Tensor:
        """1.0 if the update of a step with this norm () must be skipped, else 0.0; accepted norms are remembered."""
        bad = ~torch.isfinite(norm)
        if self.deviations:
            norm, bad = norm.to(self._norms), bad.to(self._norms.device)
            limit = self._norms.mean() + self.deviations * self._norms.std()
            bad = bad | ((self._count >= WINDOW) & (norm > limit))
            place = (self._count % WINDOW).reshape(1)
            kept = torch.where(bad, self._norms[place], norm.reshape(1))
            self._norms.index_copy_(0, place, kept)
            self._count += (~bad).long()
        return bad.float()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"guard/norms": self._norms, "guard/count": self._count} if self.deviations else {}
