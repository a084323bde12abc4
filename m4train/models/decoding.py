"""Decoding one token after another, with what came before in a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4train.errors import DataError
from m4train.models.contexts import KeyValueCache


class DecodingSteps:
    """One forward pass per step: the prompts first, then a token per row, with what came before in a cache.

    Without room `new` for new tokens there is no cache: each step computes all tokens again.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        mask: Tensor,
        inputs: dict[str, Any],
        new: int | None,
        embeds: Tensor | None = None,
    ) -> None:
        """`embeds` (B, T, H), if given, are the prompts instead of `input_ids`."""
        self.model = model
        self.cache = None if new is None else KeyValueCache(mask.shape[1] + new)
        self.ids, self.mask, self.inputs, self.embeds = input_ids, mask, inputs, embeds
        self.positions = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 0)
        self.every_column = (
            None if bool(mask[:, -1].all()) else True
        )  # the last one, which the answer follows, is padding

    def __call__(self, tokens: Tensor | None = None) -> Tensor:
        """Logits (B, V) fp32 after the prompts, or after one more token per row (B,)."""
        if tokens is not None:
            self._follow(tokens[:, None])
        output = self.model(
            self.ids if self.embeds is None else None,
            self.mask,
            inputs_embeds=self.embeds,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=1,
            every_column=self.every_column,
            output_hidden_states=False,
            output_attentions=False,
            return_dict=True,
            **self.inputs,
        )
        if self.cache is not None:
            self.inputs, self.every_column = self.model.next_inputs(self.inputs), None
        return output.logits[:, -1].float()

    def _follow(self, ids: Tensor) -> None:
        """Goes on with one more column of ids (B, 1): alone, if a cache holds the others."""
        mask, positions, again = torch.ones_like(ids), self.positions[:, -1:] + 1, self.model.next_inputs(self.inputs)
        if self.cache is None:
            ids, mask = torch.cat((self.ids, ids), 1), torch.cat((self.mask, mask.to(self.mask.dtype)), 1)
            positions = torch.cat((self.positions, positions), 1)
            again = {**self.inputs, **{name: torch.cat((self.inputs[name], more), 1) for name, more in again.items()}}
            if self.embeds is not None:
                self.embeds = torch.cat((self.embeds, self.model.model.embed(ids[:, -1:])), 1)
        else:
            self.embeds = None
        self.ids, self.mask, self.positions, self.inputs = ids, mask, positions, again

    def real(self, input_ids: Tensor) -> Tensor:
        """(B, T) bool: which of the ids of the prompts are not padding."""
        return self.mask[:, self.mask.shape[1] - input_ids.shape[1] :].bool()

    def select(self, rows: Tensor) -> None:
        """Goes on with the rows `rows` (B',) of the batch."""
        if self.inputs.get("image_hidden_states") is not None:  # one row per image, not one per prompt
            raise DataError(
                "image_hidden_states are given for several sequences per prompt without a cache: leave use_cache out"
            )
        if self.cache is not None:
            self.cache.select(rows)
        self.embeds = None if self.embeds is None else self.embeds[rows]
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
        self.inputs = {name: v[rows] if isinstance(v, Tensor) else v for name, v in self.inputs.items()}
