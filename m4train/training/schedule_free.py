"""AdamW without a schedule of its rate (the package schedulefree): gradients are taken at another point than the weights that
are saved and evaluated, so that these are an average which needs no decay of the rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4train.config import OptimizerConfig
from m4train.config.packages import need


def schedule_free(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    need("schedulefree", "optimizer.name=schedule_free")
    return _kind()(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps)


def to_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Before the first forward pass of a step: puts the weights where this optimizer wants their gradients."""
    if getattr(optimizer, "moves", False):
        optimizer.depart()


def to_weights(optimizer: torch.optim.Optimizer) -> None:
    """After a step, made or skipped: puts the weights where they are saved and evaluated."""
    if getattr(optimizer, "moves", False):
        optimizer.arrive()


def _kind() -> Any:
    from schedulefree import AdamWScheduleFree

    class ScheduleFree(AdamWScheduleFree):
        """The weights are x of the paper between steps, and y during one; `z` is in the state, and so are the counts that the
        package keeps with its groups, so that a checkpoint holds all of them."""

        moves = True

        def depart(self) -> None:
            if not self.param_groups[0]["train_mode"]:
                self._left = [parameter.detach().clone() for parameter in self._parameters()]
                self.train()

        def arrive(self) -> None:
            """Back to exactly where `depart` left from, if no step was made."""
            if self.param_groups[0]["train_mode"]:
                for parameter, left in zip(self._parameters(), self._left, strict=True):
                    parameter.data.copy_(left)
                for group in self.param_groups:
                    group["train_mode"] = False
            self._left = []

        def step(self, closure: Any = None) -> Any:
            self.depart()
            for group in self.param_groups:
                held = self.state.get(group["params"][0], {})
                if "step" in held:
                    group["k"], group["weight_sum"] = int(held["step"].item()), held["weight_sum"].item()
                    group["lr_max"] = held["lr_max"].item()
            super().step(closure)
            self.eval()
            for group in self.param_groups:
                for parameter in group["params"]:
                    for name, key in (("step", "k"), ("weight_sum", "weight_sum"), ("lr_max", "lr_max")):
                        kept = self.state[parameter].setdefault(name, torch.zeros((), dtype=torch.float64))
                        kept.fill_(group[key])
            return None

        def _parameters(self) -> list[Tensor]:
            return [parameter for group in self.param_groups for parameter in group["params"]]

    return ScheduleFree
