"""Modules whose call a layer may leave out, and when it may not."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_watched(module: nn.Module) -> bool:
    """Whether somebody waits for a module to be called: by a hook of it or of all modules, or by another `forward` set on it.

    A layer goes straight to the projections of its attention, so that what lies before and after attention can be compiled
    as one piece each; then it calls the module instead.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )
