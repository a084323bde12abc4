"""Keeping a function outside compiled code, without the compiler: to import it takes as long as to import torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """Marks a function so that it, and all it calls, runs as it is written under torch.compile.

    `torch.compiler.disable` does the same, but imports the compiler at once, in every process, for the few runs that
    compile. These are the marks the compiler looks for: the first when it meets a call in code that it compiles, the second
    when the call is then made. They are torch's own affair: of a torch that has other ones, its function is taken.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    except (ImportError, AttributeError, TypeError):
        return torch.compiler.disable(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    set_code_exec_strategy(function.__code__, skip)
    return function
