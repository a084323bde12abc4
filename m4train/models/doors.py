"""The two doors of every model: a PackedBatch, or the documented padded arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch
from m4train.errors import DataError
from m4train.models.contexts import CachedContext, KeyValueCache, PackedContext, RecordingContext
from m4train.models.loss import token_loss
from m4train.models.outputs import BaseModelOutput, CausalLMOutput
from m4train.models.padded import PaddedTokens, input_mask, shifted_targets


class ModelDoors(nn.Module):
    """The doors of a model without head."""

    config: Any
    text_model: Any

    def forward_packed(self, batch: PackedBatch) -> Tensor:
        raise NotImplementedError

    def embed_padded(
        self, flat: Tensor, is_image: Tensor, tokens: PaddedTokens, image_inputs: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Hidden states: (T, H) for a PackedBatch; a `BaseModelOutput` for padded arguments.

        Args:
            input_ids: (B, T), or the PackedBatch; or give inputs_embeds (B, T, H).
            attention_mask: (B, T), 0 at padding; with a cache also (B, past + T).
            position_ids: (B, T); by default the column.
            past_key_values: what an earlier call with `use_cache` returned.
            pixel_values: (B, N, 3, S, S), all-zero images being padding; pixel_attention_mask: (B, N, S, S).
            image_hidden_states: features to use in place of pixel_values.

        Raises:
            DataError: inputs that do not fit each other or the model.
        """
        if isinstance(input_ids, PackedBatch):
            return self.forward_packed(input_ids)
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("give exactly one of input_ids and inputs_embeds")
        images = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "image_hidden_states": image_hidden_states,
        }
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = past_key_values if past_key_values is not None else (KeyValueCache() if use_cache else None)
        embeds, is_image = self._embed(input_ids, inputs_embeds)
        shape = (embeds.shape[0], embeds.shape[1])
        mask = input_mask(attention_mask, shape, cache, embeds.device)
        past = cache.length if cache is not None else 0
        # With a cache every column is computed, so that a step is the same few operations for any mask.
        tokens = PaddedTokens.of(mask if not past else torch.ones_like(mask))
        flat, features = self.embed_padded(tokens.flatten(embeds), tokens.flatten(is_image), tokens, images)
        if position_ids is None:
            position_ids = torch.arange(past, past + shape[1], device=embeds.device)[None]
        tables = self.text_model.rotary.tables(tokens.flatten(position_ids.expand(shape)))
        context = self._context(tables, tokens, mask, cache, bool(output_attentions))
        record: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.text_model(flat, context, record)
        output = BaseModelOutput(
            last_hidden_state=tokens.unflatten(hidden),
            past_key_values=cache,
            hidden_states=None if record is None else tuple(tokens.unflatten(h) for h in record),
            attentions=tuple(context.weights) if isinstance(context, RecordingContext) else None,
            image_hidden_states=features,
        )
        return output if return_dict is not False else output.to_tuple()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, H), and which of the places are for images."""
        table = self.text_model.embed_tokens
        if input_ids is not None:
            if not input_ids.is_cuda and input_ids.numel() and int(input_ids.max()) >= table.num_embeddings:
                raise DataError(
                    f"input_ids holds the id {int(input_ids.max())}, but the embedding has {table.num_embeddings} rows: "
                    "use the tokenizer of this model"
                )
            return table(input_ids), input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        return inputs_embeds, (inputs_embeds == table.weight[self.config.image_token_id]).all(-1)

    def _context(
        self,
        tables: tuple[Tensor, Tensor],
        tokens: PaddedTokens,
        mask: Tensor,
        cache: KeyValueCache | None,
        output_attentions: bool,
    ) -> Any:
        window = self.config.text_config.window
        past = cache.length if cache is not None else 0
        if output_attentions:
            if past:
                raise DataError("output_attentions works on whole sequences only: call without past_key_values")
            return RecordingContext(tables, tokens.rows, tokens.columns, tokens.shape, window)
        if cache is None:
            return PackedContext(tables, tokens.segments, window)
        cache.extend(mask)
        if past:
            return CachedContext(tables, cache, tokens.shape[1], window)
        return PackedContext(tables, tokens.segments, window, cache, tokens.rows, tokens.columns)


class LMDoors(nn.Module):
    """The doors of a model with head."""

    config: Any
    model: Any
    lm_head: Any

    def forward_packed(self, batch: PackedBatch, z_loss: float = 0.0, return_logits: bool = False) -> Any:
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        z_loss: float = 0.0,
        return_logits: bool = False,
        **inputs: Any,
    ) -> Any:
        """`PackedOutput` for a PackedBatch; `CausalLMOutput` for padded arguments (see the model without head).

        Args:
            labels: (B, T); -100, the image token, and whatever the attention mask hides never count.
            logits_to_keep: logits of that many last columns only (0: all), or of the columns of a tensor.
            num_items_in_batch: divides the summed loss in place of the number of labels.
            z_loss, return_logits: for a PackedBatch: weight of the z-loss; whether to compute logits (T, V).
        """
        if isinstance(input_ids, PackedBatch):
            return self.forward_packed(input_ids, z_loss, return_logits)
        out: BaseModelOutput = self.model(input_ids, attention_mask, **inputs)
        hidden = out.last_hidden_state
        loss = None
        if labels is not None:
            mask = input_mask(attention_mask, (hidden.shape[0], hidden.shape[1]), None, hidden.device)
            loss = self._mean_loss(hidden, labels, PaddedTokens.of(mask), num_items_in_batch)
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        output = CausalLMOutput(
            loss=loss,
            logits=self.lm_head(kept),
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=out.image_hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()

    def _mean_loss(self, hidden: Tensor, labels: Tensor, tokens: PaddedTokens, count: int | Tensor | None) -> Tensor:
        positions, targets = shifted_targets(labels, tokens, self.config.image_token_id)
        loss, _ = token_loss(self.lm_head, tokens.flatten(hidden)[positions], targets)
        return loss / (max(1, targets.shape[0]) if count is None else count)
