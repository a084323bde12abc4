"""Random weights drawn from one generator, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m4train.models.layers import RMSNorm


@torch.no_grad()
def fill_normal(parameter: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Fills `parameter` from N(0, std); does nothing on the meta device."""
    if parameter.is_meta:
        return
    device = generator.device if generator is not None else parameter.device
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)
    parameter.copy_(drawn)


@torch.no_grad()
def init_modules(root: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Matrices and embeddings from N(0, std), biases 0, norms 1, in the order of `root.modules()`.

    Convolutions, which are the patch embeddings, from N(0, 1/fan_in), as SigLIP starts: with a small std the pixels drown in
    the position embeddings, and a tower from scratch takes many steps to see them.
    """
    for module in root.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            fill_normal(module.weight, std, generator)
        elif isinstance(module, nn.Conv2d):
            fill_normal(module.weight, module.weight[0].numel() ** -0.5, generator)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            module.weight.fill_(1.0)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
