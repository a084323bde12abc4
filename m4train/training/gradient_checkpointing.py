"""Recomputing activations in the backward pass, block by block."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: dict[str, list[nn.Module]]) -> None:
    """Makes every block keep only its inputs and recompute the rest in the backward pass.

    The block's `forward` is replaced rather than the block wrapped, so that no parameter changes its name.
    """
    for members in blocks.values():
        for block in members:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
