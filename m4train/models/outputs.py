"""What models return through the padded door."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class ModelOutput:
    """Fields by name; by position those that are not None, as the documentation's tuples hold them."""

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, index) if isinstance(index, str) else self.to_tuple()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


@dataclass
class BaseModelOutput(ModelOutput):
    """`last_hidden_state` (B, T, H); `hidden_states` a tuple of these for each layer; `attentions` (B, heads, T, T) a layer."""

    last_hidden_state: Tensor
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """`loss` () mean over labels; `logits` (B, T, V); the rest as in `BaseModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
