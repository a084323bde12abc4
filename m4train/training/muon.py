"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4train.config import OptimizerConfig
from m4train.errors import ConfigError

MOMENTUM = 0.95


class MuonAdamW(torch.optim.Optimizer):
    """torch's `Muon` (Jordan et al., 2024) on the groups marked `matrices`, torch's AdamW on the others.

    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw", Liu et al., 2025), so that one learning rate and one
    weight decay serve both. Raises ConfigError if no group is marked.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {})
        matrices = [group for group in self.param_groups if group["matrices"]]
        others = [group for group in self.param_groups if not group["matrices"]]
        if not matrices:
            raise ConfigError(
                "optimizer.name is muon, but no matrix of a hidden layer trains (embeddings, head and adapters are left to "
                "AdamW): choose optimizer=adamw."
            )
        momentum = MOMENTUM if config.momentum is None else config.momentum
        self._inner: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=config.lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            betas = (config.betas[0], config.betas[1])
            self._inner.append(torch.optim.AdamW(others, lr=config.lr, betas=betas, eps=config.eps, fused=True))
        for optimizer in self._inner:  # the groups are the same dictionaries already
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor | None:
        """One update of all groups; takes no closure."""
        for optimizer in self._inner:
            optimizer.step()
        return None
