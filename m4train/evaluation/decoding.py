"""How answers are decoded: the one rule for evaluation, samples while training, and `m4train generate`.

What ends an answer: `m4train.stops`. Everything else comes from `evaluation.decoding`, greedy by default, and nothing
from the generation_config.json of the model, except for the ids that it forbids.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from m4train.config import DecodingConfig
from m4train.models.generation_settings import GenerationSettings
from m4train.stops import stop_ids


@dataclass(frozen=True)
class Decoding:
    """The settings in force for one model and its processor."""

    config: DecodingConfig
    max_new_tokens: int
    ends: tuple[int, ...]
    end_tokens: tuple[str, ...]  # `ends` as a person reads them
    pad_id: int | None
    bad_words_ids: list[list[int]] | None

    @classmethod
    def of(cls, model: Any, processor: Any, config: DecodingConfig, max_new_tokens: int) -> Decoding:
        ends = stop_ids(processor, model.stated_ends)
        known = processor.tokenizer.convert_ids_to_tokens(ends)
        names = tuple(token or f"the id {id_}" for token, id_ in zip(known, ends))
        bad = model.generation_config.get("bad_words_ids")
        return cls(config, max_new_tokens, tuple(ends), names, processor.pad_id, bad)

    def settings(self, **others: Any) -> GenerationSettings:
        """All settings of `generate`, so that none is left to the model's folder; `others` are a generator and all_ended."""
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.pad_id,
            bad_words_ids=self.bad_words_ids,
            **asdict(self.config),
            **others,
        )

    def generator(self, seed: int, place: int, device: torch.device) -> torch.Generator | None:
        """What the answers to the batch that begins at `place` are drawn with; None if nothing is drawn."""
        if not self.config.do_sample:
            return None
        return torch.Generator(device).manual_seed((seed + 1_000_003 * place) % 2**63)

    def stated(self) -> dict[str, Any]:
        """The settings in force, as results keep them."""
        changed = {name: value for name, value in asdict(self.config).items() if value != getattr(_GREEDY, name)}
        kind = "beam search" if self.config.num_beams > 1 else "greedy"
        kind = "sampling" if self.config.do_sample else kind
        return {"kind": kind, **changed, "max_new_tokens": self.max_new_tokens, "ends": list(self.end_tokens)}

    def line(self) -> str:
        """The settings in force in one line."""
        stated = self.stated()
        kind, ends = stated.pop("kind"), stated.pop("ends")
        named = ", ".join(f"{name} {value}" for name, value in stated.items())
        return f"answers: {kind}, {named}, ended by {' '.join(ends) or 'nothing'}"


_GREEDY = DecodingConfig()
