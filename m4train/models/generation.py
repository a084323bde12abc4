"""Text generation with a key-value cache: greedy, sampling, beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from m4train.errors import DataError
from m4train.models.beam import beam_search
from m4train.models.contexts import KeyValueCache
from m4train.models.sampling import choose, forbid


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate; by default what `generation_config` of the model says, else these.

    max_new_tokens, or max_length, which counts the prompt too. do_sample: draw (with `generator`) instead of taking the most
    likely, after `temperature`, the `top_k` most likely (0: all), and the fewest that hold `top_p` of the probability.
    num_beams above 1: beam search; num_return_sequences of the best (or drawn) ones a prompt; length_penalty: exponent of
    the length a score is divided by; early_stopping: True stops at num_beams finished ones, False when no running one is
    better, "never" when none can become better. eos_token_id: one id or several that end a row. pad_token_id: what
    follows in a row that has ended. bad_words_ids: sequences of ids that must not appear. all_ended: asked after each token,
    with whether every row has ended, whether to stop: ranks that share the weights must stop together.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    generator: torch.Generator | None = None
    all_ended: Callable[[bool], bool] | None = None

    @property
    def ends(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def check(self) -> None:
        """Raises DataError for settings that do not go together."""
        if self.do_sample and self.num_beams > 1:
            raise DataError(f"do_sample and num_beams={self.num_beams} do not go together: set one of them")
        if self.all_ended is not None and self.num_beams > 1:
            raise DataError(f"num_beams={self.num_beams} cannot stop together with other ranks: set num_beams=1")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise DataError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}: raise num_beams, "
                "or set do_sample"
            )


class GenerationMixin(nn.Module):
    """Adds `generate` to a model with a head; `generation_config` holds the defaults its folder states."""

    config: Any
    generation_config: dict[str, Any]

    def next_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What of the further arguments the model needs again for each new token; the first axis is the batch."""
        return {}

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continues each prompt.

        Args:
            input_ids: (B, T) prompts, padded on the left.
            attention_mask: (B, T), 0 at padding.
            options: fields of `GenerationSettings`, and further arguments of the model, such as pixel_values.

        Returns:
            (B * num_return_sequences, T + new) the prompts and what follows.

        Raises:
            DataError: a prompt ends in padding, or settings that do not go together.
        """
        settings = self._settings(options)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(mask[:, -1].all()):
            raise DataError("a prompt ends in padding: pad prompts on the left (tokenizer.padding_side = 'left')")
        names = {f.name for f in fields(GenerationSettings)}
        inputs = {name: value for name, value in options.items() if name not in names}
        new = _new_tokens(settings, input_ids.shape[1])
        if new < 1:
            return input_ids
        steps = DecodingSteps(self, input_ids, mask, inputs, new)
        pad = self._pad(settings)
        if settings.num_beams > 1:
            return beam_search(steps, input_ids, settings, new, pad)
        return _one_by_one(steps, input_ids, settings, new, pad)

    def _settings(self, options: dict[str, Any]) -> GenerationSettings:
        names = {f.name for f in fields(GenerationSettings)}
        ends = getattr(self.config, "eos_token_id", self.config.extra.get("eos_token_id"))
        stated = {"eos_token_id": ends, **self.generation_config}
        stated = {name: value for name, value in stated.items() if name in names and value is not None}
        settings = GenerationSettings(**{**stated, **{name: options[name] for name in names if name in options}})
        settings.check()
        return settings

    def _pad(self, settings: GenerationSettings) -> int:
        config = self.config
        own = getattr(config, "pad_token_id", None)
        candidates = (settings.pad_token_id, own, config.text_config.pad_token_id, *settings.ends, 0)
        # The default of a class is made for its published model: it may lie beyond a smaller vocabulary.
        return next(value for value in candidates if value is not None and value < config.token_rows)


class DecodingSteps:
    """One forward pass a step: the prompts first, then a token a row."""

    def __init__(self, model: Any, input_ids: Tensor, mask: Tensor, inputs: dict[str, Any], new: int) -> None:
        self.model = model
        self.cache = KeyValueCache(input_ids.shape[1] + new)
        self.again = model.next_inputs(inputs)
        self.positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        self._prompt: tuple[Tensor, Tensor, dict[str, Any]] | None = (input_ids, mask, inputs)

    def __call__(self, tokens: Tensor | None = None) -> Tensor:
        """Logits (B, V) fp32 after the prompts, or after one more token a row (B,)."""
        if tokens is None:
            assert self._prompt is not None
            ids, mask, inputs = self._prompt
            self._prompt = None
        else:
            ids, inputs = tokens[:, None], self.again
            mask = torch.ones_like(ids)
            self.positions = self.positions[:, -1:] + 1
        output = self.model(
            ids,
            mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        return output.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch."""
        self.cache.select(rows)
        self.positions = self.positions[rows]
        self.again = {name: value[rows] for name, value in self.again.items()}


def _new_tokens(settings: GenerationSettings, prompt: int) -> int:
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    return 20 if settings.max_length is None else settings.max_length - prompt


def _one_by_one(steps: DecodingSteps, input_ids: Tensor, settings: GenerationSettings, new: int, pad: int) -> Tensor:
    logits = steps()
    if settings.num_return_sequences > 1:
        rows = torch.arange(input_ids.shape[0], device=input_ids.device).repeat_interleave(
            settings.num_return_sequences
        )
        steps.select(rows)
        input_ids, logits = input_ids[rows], logits[rows]
    stop = torch.tensor(settings.ends, dtype=torch.int64, device=input_ids.device)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    sequences = input_ids
    for step in range(new):
        if step:
            logits = steps(sequences[:, -1])
        logits = forbid(logits, sequences, settings.bad_words_ids, settings.ends)
        tokens = torch.where(ended, pad, choose(logits, settings))
        sequences = torch.cat((sequences, tokens[:, None]), dim=1)
        ended = ended | torch.isin(tokens, stop)
        here = bool(ended.all())
        if here if settings.all_ended is None else settings.all_ended(here):
            break
    return sequences
