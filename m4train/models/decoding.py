"""Decoding one token after another, with what came before in a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m4train.errors import DataError
from m4train.models.contexts import KeyValueCache
from m4train.models.prefixes import Beginnings, beginnings, each_alone


class DecodingSteps:
    """One forward pass per step: the prompts first, then a token per row, with what came before in a cache.

    Without room `new` for new tokens there is no cache: each step computes all tokens again. What prompts share, such as the
    image of several questions, is read once, in a pass of its own.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        mask: Tensor,
        inputs: dict[str, Any],
        new: int | None,
        embeds: Tensor | None = None,
        all_ranks: Callable[[bool], bool] | None = None,
    ) -> None:
        """`embeds` (B, T, H), if given, are the prompts instead of `input_ids`; `all_ranks` says whether something holds on
        every rank that shares the weights: they make the same passes."""
        self.model, self.new, self.all_ranks = model, new, all_ranks
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
        elif (
            self.cache is not None
            and self.every_column is None
            and self.embeds is None
            and self.model.shares_beginnings
        ):
            self._begin()
        return self._pass()

    def _begin(self) -> None:
        """Reads the beginnings that prompts share, if there are any on some rank; what is left of each prompt comes next."""
        window, pixels = self.model.config.text_config.window, self.inputs.get("pixel_values")
        prompts = [[one for one, there in zip(*row) if there] for row in zip(self.ids.tolist(), self.mask.tolist())]
        shared = None
        if pixels is not None and pixels.dim() == 5 and (window is None or self.ids.shape[1] <= window):
            pixel_mask = self.inputs.get("pixel_attention_mask")
            shared = beginnings(prompts, pixels, pixel_mask, self.model.config.image_token_id)
        if shared is None if self.all_ranks is None else self.all_ranks(shared is None):
            return
        self._read(prompts, shared or each_alone(prompts))

    def _read(self, prompts: list[list[int]], first: Beginnings) -> None:
        assert self.cache is not None
        assert self.new is not None
        rest = [prompt[first.lengths[group] :] for prompt, group in zip(prompts, first.group)]
        begun = [prompts[row][:length] for row, length in zip(first.rows, first.lengths)]
        self.cache.capacity = max(map(len, begun)) + max(map(len, rest)) + self.new
        rows, whole = torch.tensor(first.rows, device=self.ids.device), self.inputs
        self._take(begun, [0] * len(begun))
        self.inputs = {name: v[rows] if isinstance(v, Tensor) else v for name, v in whole.items()}
        self._pass()
        self.cache.select(torch.tensor(first.group, device=self.ids.device))
        self._take(rest, [first.lengths[group] for group in first.group])

    def _take(self, rows: list[list[int]], places: list[int]) -> None:
        """Goes on with the ids of `rows`, padded on the left, whose first ones are at `places` of their prompts."""
        width, device = max(map(len, rows)), self.ids.device
        padded = lambda values: torch.tensor([[0] * (width - len(row)) + row for row in values], device=device)
        self.ids, self.mask = padded(rows), padded([[1] * len(row) for row in rows])
        self.positions = padded([list(range(at, at + len(row))) for at, row in zip(places, rows)])

    def _pass(self) -> Tensor:
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
