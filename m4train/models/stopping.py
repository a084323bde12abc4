"""What ends a row that is being generated: ids, strings, and criteria of the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m4train.errors import WrongArgument

if TYPE_CHECKING:
    from m4train.models.generation_settings import GenerationSettings

_SPARE = 8  # tokens decoded before those a stop string may take: some spell nothing by themselves


class Stopping:
    """Asked after each token which rows have ended. Raises WrongArgument for stop strings without a tokenizer."""

    def __init__(self, settings: GenerationSettings, device: torch.device) -> None:
        given = settings.stop_strings
        self.strings = [given] if isinstance(given, str) else list(given or [])
        self.tokenizer, self.criteria = settings.tokenizer, list(settings.stopping_criteria or [])
        self.ends = torch.tensor(settings.ends, dtype=torch.int64, device=device)
        if self.strings and self.tokenizer is None:
            raise WrongArgument(f"stop_strings is {given!r}, which takes a tokenizer to find: give tokenizer= as well")

    @property
    def by_id(self) -> bool:
        """Whether the last id alone decides."""
        return not self.strings and not self.criteria

    def __call__(self, sequences: Tensor, scores: Tensor | None = None) -> Tensor:
        """(rows,) bool for `sequences` (rows, T); `scores` (rows, V) are those of the last token."""
        ended = torch.isin(sequences[:, -1], self.ends)
        if self.strings:
            spelled = [self._spelled(row) for row in sequences.tolist()]
            ended = ended | torch.tensor(spelled, device=sequences.device)
        for criterion in self.criteria:
            found = torch.as_tensor(criterion(sequences, scores), dtype=torch.bool, device=sequences.device)
            ended = ended | found
        return ended

    def _spelled(self, row: list[int]) -> bool:
        """Whether the last token of a row completes one of the strings."""
        tail = row[-(max(len(string.encode()) for string in self.strings) + _SPARE) :]
        before, text = len(self.tokenizer.decode(tail[:-1])), self.tokenizer.decode(tail)
        return any(text.find(string, max(0, before - len(string) + 1)) >= 0 for string in self.strings)
