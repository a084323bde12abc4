"""What models return through the padded door."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


class ModelOutput(OrderedDict):
    """A dictionary of the fields that are not None, in their order; also read as attributes and, by position, as a tuple.

    A field that is set later joins it; none can be taken out.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in {field.name for field in fields(self)}:  # type: ignore[arg-type]  # dataclasses
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{type(self).__name__} keeps its fields: copy it into a dict to take {key} out")

    def pop(self, key: str, *default: Any) -> Any:
        del self[key]

    def setdefault(self, key: str, default: Any = None) -> Any:
        raise TypeError(f"{type(self).__name__} has the fields of its class: set {key} as an attribute")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass(eq=False, repr=False)
class BaseModelOutput(ModelOutput):
    """`last_hidden_state` (B, T, H); `hidden_states` a tuple of these a layer; `attentions` (B, heads, T, T) a layer."""

    last_hidden_state: Tensor
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass(eq=False, repr=False)
class CausalLMOutput(ModelOutput):
    """`loss` () mean over labels; `logits` (B, T, V); the rest as in `BaseModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
