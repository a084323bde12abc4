"""The engine of one process, for a model of fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from m4train.batch import PackedBatch, PackedOutput
from m4train.errors import ConfigError
from m4train.training.engines.single import SingleEngine


class FakeSingle(SingleEngine):
    """The model stays where it is, since fake tensors cannot be moved in place."""

    hold: Callable[[str, Iterable[Tensor]], None] = staticmethod(
        lambda kind, tensors: None
    )  # tells what tensors are for

    def kinds(self) -> dict[str, list[Tensor]]:
        """What there is next to the model and the optimizer's state, by what it is for."""
        return {}

    def prepare(self, model: Any) -> None:
        with staying():
            super().prepare(model)
        if self.config.engine.name == "zero3":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(_passed_on)

    def optimise(self, trainable: dict[str, nn.Parameter], updated: dict[str, nn.Parameter] | None = None) -> None:
        """Raises ConfigError for an optimizer whose state only real values can make."""
        name = self.config.optimizer.name
        if name in _STATES:
            self.trainable, tables = trainable, (torch.empty(256), torch.empty(256))  # which all share
            self.optimizer = torch.optim.SGD([{"params": [*trainable.values()], "names": [*trainable]}], lr=0.0)
            self.optimizer.state.update({p: _STATES[name](p, tables) for p in trainable.values()})
            return
        try:
            super().optimise(trainable, updated)
        except DataDependentOutputException as error:
            raise ConfigError(
                f"What optimizer.name={name} keeps cannot be estimated, since it looks at values: estimate with "
                "optimizer.name=adamw, which keeps two values of four bytes for each that trains."
            ) from error

    def forward(self, batch: PackedBatch, z_loss: float = 0.0) -> PackedOutput:
        """See `Engine.forward`: loss (), token losses (L,). Under ZeRO-3 autocast keeps no copy of a weight for a second use."""
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(cached and self.config.engine.name != "zero3")
        try:
            return super().forward(batch, z_loss)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def update(self, factor: float, max_norm: float) -> Any:
        """Optimizers that look at values on their way cannot run on fake ones; what they need besides their state is small."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            return super().update(factor, max_norm)
        return self.optimizer.zero_grad(set_to_none=True)


def _passed_on(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed passes inputs through a function of its own, after which nobody knows of what they can be made again."""
    return tuple(value.view_as(value) if isinstance(value, Tensor) else value for value in inputs)


def _moments_in_bytes(parameter: Tensor, tables: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The state of 8-bit AdamW: a byte per value and moment, scales of blocks of 256, and what a byte means."""
    count = parameter.numel()
    if count < 4096:  # these it keeps in fp32
        return {"step": 0, "state1": torch.empty(count), "state2": torch.empty(count)}
    kinds = {"state": (count, torch.uint8), "absmax": (-(-count // 256), torch.float32)}
    sized = {f"{kind}{i}": torch.empty(size, dtype=dtype) for kind, (size, dtype) in kinds.items() for i in (1, 2)}
    return {"step": 0, **sized, "qmap1": tables[0], "qmap2": tables[1]}


def _factors(parameter: Tensor, _: Any) -> dict[str, Any]:
    """The state of Adafactor: a value per row and one per column of a matrix."""
    step = torch.empty(())
    if parameter.dim() < 2:
        return {"step": step, "variance": torch.empty_like(parameter)}
    *rows, columns = parameter.shape
    return {"step": step, "row_var": torch.empty(*rows, 1), "col_var": torch.empty(*rows[:-1], 1, columns)}


# Of the optimizers whose kernels take no fake tensors; what the others keep they make themselves.
_STATES = {"adamw_8bit": _moments_in_bytes, "paged_adamw_8bit": _moments_in_bytes, "adafactor": _factors}


@contextmanager
def staying() -> Iterator[None]:
    """Makes `to` of every module do nothing."""
    moved = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self
    try:
        yield
    finally:
        nn.Module.to = moved
