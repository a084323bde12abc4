"""Text generation with a key-value cache: greedy, sampling, beam search."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from m4train.models.beam import beam_search
from m4train.models.decoding import DecodingSteps
from m4train.models.generation_settings import (
    GenerationSettings,
    generation_settings,
    model_arguments,
    stated_ends,
)
from m4train.models.padded import as_tensor
from m4train.models.sampling import choose, constrain


class GenerationMixin(nn.Module):
    """Adds `generate` to a model with a head; `generation_config` holds the defaults its folder states."""

    config: Any
    generation_config: dict[str, Any]

    def next_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of the further arguments that the model needs again for each new token, each (B, ...)."""
        return {}

    @property
    def stated_ends(self) -> list[int]:
        """The ids that end an answer by what the folder of the model states."""
        return stated_ends(self.config, self.generation_config)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continues each prompt.

        Args:
            input_ids: (B, T) prompts, padded on the left; here and below, lists and arrays become tensors.
            attention_mask: (B, T), 0 at padding; by default 0 at pad_token_id, unless that is also an eos_token_id.
            options: fields of `GenerationSettings`, and further arguments of the model, such as pixel_values.

        Returns:
            (B * num_return_sequences, T + new) the prompts and what follows.

        Raises:
            DataError: a prompt ends in padding, or settings that do not go together.
            TypeError: an argument that there is not, or that asks for what is not implemented.
        """
        settings = generation_settings(self.config, self.generation_config, options)
        device = next(self.parameters()).device
        given = model_arguments(options, self.model.image_arguments)
        inputs = {name: as_tensor(name, value, device) for name, value in given.items()}
        input_ids = as_tensor("input_ids", input_ids, device)
        mask = as_tensor("attention_mask", attention_mask, device)
        mask = _mask_of(input_ids, settings) if mask is None else mask
        if not bool(mask[:, -1].all()):
            warnings.warn("a prompt ends in padding, which the answer follows: pad prompts on the left", stacklevel=3)
        new = settings.most_new(input_ids.shape[1])
        if new < 1:
            return input_ids
        steps = DecodingSteps(self, input_ids, mask, inputs, new if settings.use_cache else None)
        pad = self._pad(settings)
        if settings.num_beams > 1:
            return beam_search(steps, input_ids, settings, new, pad)
        return _one_by_one(steps, input_ids, settings, new, pad)

    def _pad(self, settings: GenerationSettings) -> int:
        candidates = (settings.pad_token_id, self.config.text_config.pad_token_id, *settings.ends, 0)
        # The default of a class is made for its published model: it may be beyond a smaller vocabulary.
        return next(value for value in candidates if value is not None and value < self.config.token_rows)


def _mask_of(input_ids: Tensor, settings: GenerationSettings) -> Tensor:
    """The attention mask of prompts that come without one."""
    pad = settings.pad_token_id
    return torch.ones_like(input_ids) if pad is None or pad in settings.ends else (input_ids != pad).long()


def _one_by_one(steps: DecodingSteps, input_ids: Tensor, settings: GenerationSettings, new: int, pad: int) -> Tensor:
    real, logits = steps.mask.bool(), steps()
    if settings.num_return_sequences > 1:
        rows = torch.arange(input_ids.shape[0], device=input_ids.device).repeat_interleave(
            settings.num_return_sequences
        )
        steps.select(rows)
        input_ids, real, logits = input_ids[rows], real[rows], logits[rows]
    stop = torch.tensor(settings.ends, dtype=torch.int64, device=input_ids.device)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    sequences = input_ids
    for step in range(new):
        if step:
            logits = steps(sequences[:, -1])
        logits = constrain(logits, sequences, settings, real)
        tokens = torch.where(ended, pad, choose(logits, settings))
        sequences = torch.cat((sequences, tokens[:, None]), dim=1)
        ended = ended | torch.isin(tokens, stop)
        here = bool(ended.all())
        if here if settings.all_ended is None else settings.all_ended(here):
            break
    return sequences
