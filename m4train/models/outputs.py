"""What models return through the padded door."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from m4train.models.generation_settings import GenerationSettings


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


@dataclass(eq=False, repr=False)
class GenerateOutput(ModelOutput):
    """`sequences` (rows, T) prompts with what follows; `sequences_scores` (rows,) and `beam_indices` (rows, new), the row of
    `scores` that each token was chosen by (-1 behind the end), of beams; a `scores` and a `logits` (rows, V)
    for each token, if they were asked for, after and before the settings acted."""

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None


class Record:
    """The scores and logits of each new token, kept if the settings ask for them."""

    def __init__(self, settings: GenerationSettings) -> None:
        asked = settings.return_dict_in_generate
        self.scores: list[Tensor] | None = [] if asked and settings.output_scores else None
        self.logits: list[Tensor] | None = [] if asked and settings.output_logits else None

    def add(self, logits: Tensor, scores: Tensor) -> None:
        """Keeps the logits and the scores (rows, V) of one more token, those that were asked for."""
        for kept, new in ((self.logits, logits), (self.scores, scores)):
            if kept is not None:
                kept.append(new)

    def output(self, sequences: Tensor, values: Tensor | None = None, origins: Tensor | None = None) -> GenerateOutput:
        """The output of a call with `sequences` (rows, T) and, of beams, their `values` (rows,) and `origins` (rows, new)."""
        scores, logits = (None if kept is None else tuple(kept) for kept in (self.scores, self.logits))
        return GenerateOutput(sequences, values, scores, logits, origins)
