"""The two doors of every model: a PackedBatch, or the documented padded arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from m4train.batch import IGNORE_INDEX, PackedBatch
from m4train.errors import DataError
from m4train.models.arguments import by_position, warn_of_ignored
from m4train.models.checks import check_ids, naming_ids
from m4train.models.contexts import CachedContext, DenseContext, KeyValueCache, PackedContext, RecordingContext
from m4train.models.loss import token_loss
from m4train.models.outputs import BaseModelOutput, CausalLMOutput
from m4train.models.padded import HiddenStates, PaddedTokens, as_tensor, input_mask, needs_padding


@dataclass
class PaddedInputs:
    """Padded arguments as the packed computation takes them."""

    hidden: Tensor  # (tokens, H) embeddings
    ids: Tensor | None  # (tokens,) if ids were given
    tokens: PaddedTokens
    context: Any  # see contexts.py
    cache: KeyValueCache | None
    images: dict[str, Any] = field(default_factory=dict)
    record: HiddenStates | None = None  # collects hidden states a layer


class ModelDoors(nn.Module):
    """The doors of a model without head. A model says how it embeds tokens and what it does with its images."""

    image_arguments: ClassVar[tuple[str, ...]] = ()  # the padded arguments `run_padded` understands
    documented_order: ClassVar[tuple[str, ...]] = ()  # arguments of `forward` by position, after inputs_embeds

    config: Any
    rotary: Any

    def forward_packed(self, batch: PackedBatch) -> Tensor:
        """Hidden states (T, H) after the last norm."""
        raise NotImplementedError

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings (..., H)."""
        raise NotImplementedError

    def run_padded(self, inputs: PaddedInputs) -> tuple[Tensor, Tensor | None]:
        """Hidden states (tokens, H), and the image features that were used."""
        raise NotImplementedError

    def default_positions(self, mask: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Positions (B, T) of the new columns, by their `mask`."""
        past = cache.length if cache is not None else 0
        return torch.arange(past, past + mask.shape[1], device=mask.device).expand(mask.shape)

    @by_position
    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        every_column: bool | None = None,
        **images: Any,
    ) -> Any:
        """Hidden states: (T, H) for a PackedBatch; a `BaseModelOutput` for padded arguments.

        Lists and arrays become tensors; what is None is as the configuration says. Arguments may be given by position in the
        order of `documented_order`; ones that there are not are ignored with a warning.

        Args:
            input_ids: (B, T), or the PackedBatch; or give inputs_embeds (B, T, H).
            attention_mask: (B, T), 0 at padding; with a cache also (B, past + T).
            position_ids: (B, T); by default see `default_positions`.
            past_key_values: what an earlier call with `use_cache` returned, or keys and values (B, kv_heads, past, head_dim)
                of each layer.
            cache_position: not used: a cache knows which columns it holds.
            every_column: compute padding as the reference does, instead of leaving zeros there; None: in rows of nothing else.
            images: the arguments named in `image_arguments`.

        Raises:
            DataError: inputs that do not fit each other or the model.
        """
        if isinstance(input_ids, PackedBatch):
            with naming_ids(self.config.token_rows, input_ids=input_ids.input_ids):
                return self.forward_packed(input_ids)
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("give exactly one of input_ids and inputs_embeds")
        if images.pop("mm_encoder_outputs", None) is not None:
            raise TypeError(
                f"{type(self).__name__} has no mm_encoder_outputs: give the features of the images as image_hidden_states"
            )
        warn_of_ignored(type(self).__name__, set(images) - set(self.image_arguments))
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        given = self._tensors(input_ids=input_ids, mask=attention_mask, positions=position_ids, embeds=inputs_embeds)
        cache = _cache(past_key_values, given["mask"], bool(use_cache))
        recorded = wanted(self.config, "output_attentions", output_attentions)
        inputs = self._gather(**given, cache=cache, record=recorded, every_column=every_column)
        inputs.images = self._tensors(**{name: images[name] for name in self.image_arguments if name in images})
        states = wanted(self.config, "output_hidden_states", output_hidden_states)
        inputs.record = HiddenStates(inputs.tokens) if states else None
        output = self._output(inputs, *self.run_padded(inputs))
        return output if wanted(self.config, "return_dict", return_dict) else output.to_tuple()

    def _tensors(self, **values: Any) -> dict[str, Any]:
        device = next(self.parameters()).device
        return {name: as_tensor(name, value, device) for name, value in values.items()}

    def _output(self, inputs: PaddedInputs, hidden: Tensor, features: Tensor | None) -> BaseModelOutput:
        context, states = inputs.context, None if inputs.record is None else tuple(inputs.record.states)
        return BaseModelOutput(
            last_hidden_state=inputs.tokens.unflatten(hidden) if states is None else states[-1],
            past_key_values=inputs.cache,
            hidden_states=states,
            attentions=tuple(context.weights) if isinstance(context, RecordingContext) else None,
            image_hidden_states=features,
        )

    def _gather(
        self,
        input_ids: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        embeds: Tensor | None,
        cache: KeyValueCache | None,
        record: bool,
        every_column: bool | None,
    ) -> PaddedInputs:
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.token_rows)
            embeds = self.embed(input_ids)
        assert embeds is not None
        shape = (embeds.shape[0], embeds.shape[1])
        mask = input_mask(mask, shape, cache, embeds.device)
        past = cache.length if cache is not None else 0
        if every_column is None:
            every_column = not past and needs_padding(mask, None)
        # With a filled cache every column is computed, so that a step is the same few operations for any mask.
        tokens = PaddedTokens.every(shape, embeds.device) if past or every_column else PaddedTokens.of(mask)
        if positions is None:
            positions = self.default_positions(mask, cache)
        tables = self.rotary.tables(tokens.flatten(positions.expand(shape)))
        if record and past:
            raise DataError("output_attentions works on whole sequences only: call without past_key_values")
        context = self._context(tables, tokens, mask, cache, record, every_column)
        ids = None if input_ids is None else tokens.flatten(input_ids)
        return PaddedInputs(tokens.flatten(embeds), ids, tokens, context, cache)

    def _context(
        self,
        tables: tuple[Tensor, Tensor],
        tokens: PaddedTokens,
        mask: Tensor,
        cache: KeyValueCache | None,
        record: bool,
        every_column: bool,
    ) -> Any:
        window = self.config.text_config.window
        if record:
            return RecordingContext(tables, tokens.rows, tokens.columns, mask, window)
        past = cache.length if cache is not None else 0
        if cache is not None:
            cache.extend(mask)
            if past:
                return CachedContext(tables, cache, tokens.shape[1], window)
        if every_column:
            return DenseContext(tables, mask, window, cache, tokens.rows, tokens.columns)
        return PackedContext(tables, tokens.segments, window, cache, tokens.rows, tokens.columns)


def _cache(
    given: KeyValueCache | Sequence[tuple[Tensor, Tensor]] | None, mask: Tensor | None, wanted: bool
) -> KeyValueCache | None:
    if given is None:
        return KeyValueCache() if wanted else None
    return given if isinstance(given, KeyValueCache) else KeyValueCache.of(given, mask)


def wanted(config: Any, name: str, given: bool | None) -> bool:
    """What a call says of its outputs, else the configuration, else: a return_dict, and nothing further."""
    return bool(getattr(config, name, name == "return_dict") if given is None else given)


class LMDoors(nn.Module):
    """The doors of a model with head."""

    config: Any
    model: Any
    lm_head: Any
    documented_order: ClassVar[tuple[str, ...]] = ()  # arguments of `forward` by position, after inputs_embeds

    def forward_packed(self, batch: PackedBatch, z_loss: float = 0.0, return_logits: bool = False) -> Any:
        """The loss of a batch, with the weight `z_loss`, and its logits (T, V) if `return_logits`."""
        raise NotImplementedError

    @by_position
    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor | None = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        every_column: bool | None = None,
        z_loss: float = 0.0,
        return_logits: bool = False,
        **inputs: Any,
    ) -> Any:
        """`PackedOutput` for a PackedBatch; `CausalLMOutput` for padded arguments (see the model without head).

        Args:
            labels: (B, T); all count but -100, as in transformers 5: those of padding and of image tokens too. The logits
                that predict a label at padding, or behind it, are those of transformers with its attention "sdpa".
            logits_to_keep: logits of that many last columns only (0: all), or of the columns of a tensor.
            num_items_in_batch: divides the summed loss instead of the number of labels.
            z_loss, return_logits: for a PackedBatch: weight of the z-loss; whether to compute logits (T, V).

        Raises:
            DataError: inputs or labels that do not fit each other or the model.
        """
        if isinstance(input_ids, PackedBatch):
            with naming_ids(self.config.token_rows, targets=input_ids.targets):
                return self.forward_packed(input_ids, z_loss, return_logits)
        device = next(self.parameters()).device
        labels, mask = as_tensor("labels", labels, device), as_tensor("attention_mask", attention_mask, device)
        if every_column is None and labels is not None and mask is not None and past_key_values is None:
            every_column = mask.shape == labels.shape and needs_padding(mask.bool(), labels)
        out: BaseModelOutput = self.model(
            input_ids,
            mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            return_dict=True,
            every_column=every_column,
            **inputs,
        )
        hidden, keep = out.last_hidden_state, 0 if logits_to_keep is None else logits_to_keep
        output = CausalLMOutput(
            loss=None if labels is None else self._mean_loss(hidden, labels, num_items_in_batch),
            logits=self.lm_head(hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep]),
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=out.image_hidden_states,
        )
        return output if wanted(self.config, "return_dict", return_dict) else output.to_tuple()

    def _mean_loss(self, hidden: Tensor, labels: Tensor, count: int | Tensor | None) -> Tensor:
        if labels.shape != hidden.shape[:2]:
            raise DataError(
                f"labels have shape {tuple(labels.shape)}, but the inputs {tuple(hidden.shape[:2])}: give one a column"
            )
        counted = labels[:, 1:] != IGNORE_INDEX
        targets = labels[:, 1:][counted]
        check_ids("labels", targets, self.config.token_rows)
        loss, _ = token_loss(self.lm_head, hidden[:, :-1][counted], targets)
        return loss / (targets.shape[0] if count is None else count)
