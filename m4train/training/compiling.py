"""torch.compile, by regions of a block: what lies between its attention and what comes before and after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from m4train.config import AdapterConfig, Config
from m4train.errors import ConfigError

# Kinds of one region: with and without gradients, of layers that train, are frozen or adapted. Never one for each size.
_KINDS = 64


def compiles(config: Config) -> bool:
    """Whether a run compiles: as trainer.compile says, or, for auto, on a GPU, with what its compiler needs, and without a break."""
    asked = config.trainer.compile
    if asked != "auto":
        return bool(asked)
    return without_break(config) and torch.cuda.is_available() and _can_compile()


def without_break(config: Config) -> bool:
    """Whether auto compiles it on a GPU that has what a compiler needs."""
    return config.engine.name != "zero3" and traced_whole(config.adapter)


def traced_whole(adapter: AdapterConfig) -> bool:
    """Whether the compiler can read the layers of an adapter; those of DoRA ask for the module of a class (peft 0.21)."""
    return adapter.kind != "dora"


def _can_compile() -> bool:
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")  # Triton starts its kernels through code in C
    found = any(shutil.which(name) for name in compilers if name)
    return found and find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


def compile_blocks(blocks: dict[str, list[nn.Module]], backend: str = "inductor", whole: bool = True) -> None:
    """Compiles the `regions` of every block for any number of rows; attention stays as it is written.

    Layers of one kind share their code, so that its cost does not grow with their number. To be called after adapters are in
    place. `whole`: what the compiler cannot read within a region is an error, instead of a break in its code.

    Raises ConfigError if no module of the blocks names regions.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(_KINDS, torch._dynamo.config.recompile_limit)
    modules = [module for members in blocks.values() for block in members for module in block.modules()]
    regions = [(module, name) for module in modules for name in getattr(module, "regions", ())]
    if not regions:
        raise ConfigError(
            "trainer.compile is true, but no block of this model names `regions` to compile: set it to false."
        )
    for module, name in regions:
        setattr(module, name, _for_any_rows(getattr(module, name), backend, whole))


def _for_any_rows(region: Callable[..., Any], backend: str, whole: bool) -> Callable[..., Any]:
    """`region`, compiled once for all numbers of rows of its tensors.

    The compiler takes 0 and 1 for constants, also in the tensor that one of them is a view of: so few rows are computed as they
    are written, and views are copied (none of what half precision on CUDA brings here is one).
    """
    compiled = torch.compile(region, fullgraph=whole, backend=backend)

    def run(*given: Any) -> Any:
        tensors = list(_tensors(given))
        if min(tensor.shape[0] for tensor in tensors) < 2:
            return region(*given)
        return compiled(*_ready(given))

    return run


def _tensors(given: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in given:
        yield from (value,) if isinstance(value, Tensor) else value


def _ready(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_any_rows(value) if isinstance(value, Tensor) else _ready(value) for value in given)


def _any_rows(tensor: Tensor) -> Tensor:
    whole = tensor.clone() if tensor._is_view() else tensor
    torch._dynamo.maybe_mark_dynamic(whole, 0)
    return whole
