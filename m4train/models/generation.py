"""Text generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m4train.errors import DataError
from m4train.models.contexts import KeyValueCache


class GenerationMixin(nn.Module):
    """Adds `generate` to a model with a head; `generation_config` holds the defaults its folder states."""

    config: Any
    generation_config: dict[str, Any]

    def next_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What of the further arguments the model needs again for each new token."""
        return {}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Continues each prompt by its most likely tokens.

        Args:
            input_ids: (B, T) prompts, padded on the left.
            attention_mask: (B, T), 0 at padding.
            max_new_tokens: or max_length, which counts the prompt too; 20 new tokens by default.
            eos_token_id: one id or several; a row ends with the first of them. By default those of `generation_config`.
            pad_token_id: what follows in a row that has ended; by default of the configuration, else the first eos.
            inputs: further arguments of the model, such as pixel_values.

        Returns:
            (B, T + new) the prompts and what follows.

        Raises:
            DataError: a prompt is padded on the right or empty.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(mask[:, -1].all()):
            raise DataError("a prompt ends in padding: pad prompts on the left (tokenizer.padding_side = 'left')")
        new = (
            max_new_tokens
            if max_new_tokens is not None
            else (max_length or input_ids.shape[1] + 20) - input_ids.shape[1]
        )
        ends = self._eos(eos_token_id)
        pad = self._pad(pad_token_id, ends)
        stop = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
        cache = KeyValueCache(input_ids.shape[1] + new)
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        sequences, step_ids = [input_ids], input_ids
        for step in range(new):
            logits = self(
                step_ids,
                mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **(inputs if step == 0 else self.next_inputs(inputs)),
            ).logits[:, -1]
            chosen = logits.argmax(-1)
            step_ids = torch.where(ended, pad, chosen)[:, None]
            sequences.append(step_ids)
            ended = ended | torch.isin(step_ids[:, 0], stop)
            if bool(ended.all()):
                break
            mask = torch.ones_like(step_ids)
            position_ids = position_ids[:, -1:] + 1
        return torch.cat(sequences, dim=1)

    def _eos(self, given: int | Sequence[int] | None) -> list[int]:
        for value in (given, self.generation_config.get("eos_token_id"), self.config.extra.get("eos_token_id")):
            if value is not None:
                return [value] if isinstance(value, int) else list(value)
        return []

    def _pad(self, given: int | None, ends: list[int]) -> int:
        candidates = (given, self.generation_config.get("pad_token_id"), self.config.text_config.pad_token_id, *ends, 0)
        return next(value for value in candidates if value is not None)
