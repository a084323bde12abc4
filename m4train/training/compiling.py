"""torch.compile, block by block."""

from __future__ import annotations

import torch
from torch import nn


def compile_blocks(blocks: dict[str, list[nn.Module]], backend: str = "inductor") -> None:
    """Compiles the `forward` of every block for any number of tokens; attention stays outside what is compiled.

    Blocks of one kind share their code, so that its cost does not grow with the number of layers. To be called after
    adapters are in place and before gradient checkpointing, which then recomputes compiled blocks.
    """
    for members in blocks.values():
        for block in members:
            block.forward = torch.compile(block.forward, dynamic=True, backend=backend)
