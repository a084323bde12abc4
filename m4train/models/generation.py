"""Text generation with a key-value cache: greedy, sampling, beam search."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, ClassVar

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
from m4train.models.outputs import GenerateOutput, Record
from m4train.models.padded import as_tensor
from m4train.models.sampling import choose, constrain, kept
from m4train.models.stopping import Stopping


class GenerationMixin(nn.Module):
    """Adds `generate` to a model with a head; `generation_config` holds the defaults its folder states."""

    config: Any
    shares_beginnings: ClassVar[bool] = True  # whether prompts with the same images may be read once, see `prefixes.py`

    def next_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of the further arguments that the model needs again for each new token, each (B, ...)."""
        return {}

    @property
    def stated_ends(self: Any) -> list[int]:
        """The ids that end an answer by what the folder of the model states."""
        return stated_ends(self.config, self.generation_config)

    @torch.no_grad()
    def generate(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Continues each prompt.

        Args:
            input_ids: (B, T) prompts, padded on the left, also as `inputs`; here and below, lists and arrays become tensors.
            attention_mask: (B, T), 0 at padding; by default 0 at pad_token_id, unless that is also an eos_token_id.
            inputs_embeds: (B, T, H) the prompts as embeddings; without input_ids only what follows is returned.
            options: fields of `GenerationSettings`, a `generation_config` that holds them (a mapping, an object of another
                library, or GenerationSettings, which are complete), and arguments of the model, such as pixel_values.

        Returns:
            (B * num_return_sequences, T + new) the prompts and what follows; or a `GenerateOutput`.

        Raises:
            DataError: settings that do not go together; WrongArgument, a ValueError, for one that cannot be.
            TypeError: an argument that there is not, or that asks for what is not implemented.
        """
        settings = generation_settings(self.config, self.generation_config, options)
        device = next(self.parameters()).device
        given = model_arguments(options, self.model.image_arguments)
        images = {name: as_tensor(name, value, device) for name, value in given.items()}
        ids = as_tensor("input_ids", inputs if input_ids is None else input_ids, device)
        embeds = as_tensor("inputs_embeds", inputs_embeds, device)
        if ids is None and embeds is None:
            raise TypeError("generate needs a prompt: give input_ids, or inputs_embeds")
        if ids is None:
            ids = torch.empty(embeds.shape[0], 0, dtype=torch.int64, device=device)
        mask = as_tensor("attention_mask", attention_mask, device)
        if mask is None:
            mask = _mask_of(ids, settings) if embeds is None else embeds.new_ones(embeds.shape[:2], dtype=torch.int64)
        if not bool(mask[:, -1].all()):
            warnings.warn("a prompt ends in padding, which the answer follows: pad prompts on the left", stacklevel=3)
        new = settings.most_new(mask.shape[1])
        settings = replace(settings, min_new_tokens=settings.fewest_new(mask.shape[1]), min_length=None)
        room = new if settings.use_cache else None
        steps = DecodingSteps(self, ids, mask, images, room, embeds, settings.all_ended)
        way = beam_search if settings.num_beams > 1 else _one_by_one
        output = way(steps, ids, settings, new, self._pad(settings))
        return output if settings.return_dict_in_generate else output.sequences

    def _pad(self, settings: GenerationSettings) -> int:
        candidates = (settings.pad_token_id, self.config.text_config.pad_token_id, *settings.ends, 0)
        # The default of a class is made for its published model: it may be beyond a smaller vocabulary.
        return next(value for value in candidates if value is not None and value < self.config.token_rows)


def _mask_of(input_ids: Tensor, settings: GenerationSettings) -> Tensor:
    """The attention mask of prompts that come without one."""
    pad = settings.pad_token_id
    return torch.ones_like(input_ids) if pad is None or pad in settings.ends else (input_ids != pad).long()


def _one_by_one(
    steps: DecodingSteps, input_ids: Tensor, settings: GenerationSettings, new: int, pad: int
) -> GenerateOutput:
    real, logits = steps.real(input_ids), steps()
    stopping, record, streamer = Stopping(settings, input_ids.device), Record(settings), settings.streamer
    if settings.num_return_sequences > 1:
        rows = torch.arange(input_ids.shape[0], device=input_ids.device).repeat_interleave(
            settings.num_return_sequences
        )
        steps.select(rows)
        input_ids, real, logits = input_ids[rows], real[rows], logits[rows]
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    sequences = input_ids
    if streamer is not None:
        streamer.put(sequences.cpu())
    for step in range(new):
        if step:
            logits = steps(sequences[:, -1])
        scores = kept(constrain(logits, sequences, settings, real), settings)
        record.add(logits, scores)
        tokens = torch.where(ended, pad, choose(scores, settings))
        sequences = torch.cat((sequences, tokens[:, None]), dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        ended = ended | stopping(sequences, scores)
        here = bool(ended.all())
        if here if settings.all_ended is None else settings.all_ended(here):
            break
    if streamer is not None:
        streamer.end()
    return record.output(sequences)
