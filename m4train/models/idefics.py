"""Idefics: a CLIP tower, an optional resampler, and a Llama decoder with gated cross-attention to the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4train.batch import CrossSegments, PackedBatch, PackedImages, Segments
from m4train.errors import DataError
from m4train.models.arguments import OUTPUTS
from m4train.models.backbone_configs import LlamaConfig
from m4train.models.clip_vision import ClipTower, clip_flops
from m4train.models.configuration import PretrainedConfig
from m4train.models.contexts import CrossContext, KeyValueCache, PackedContext
from m4train.models.decoder import DecoderLayer, LayerContext, decoder_flops, text_norm
from m4train.models.doors import ModelDoors, PaddedInputs
from m4train.models.hooks import is_watched
from m4train.models.idefics_images import padded_images
from m4train.models.idefics_setup import freeze, init_idefics
from m4train.models.initialisation import fill_normal
from m4train.models.layers import GatedMLP, RMSNorm, Rotary
from m4train.models.loss import LMHead
from m4train.models.model_configs import IdeficsConfig
from m4train.models.multimodal import MultimodalLM
from m4train.models.pretrained import PretrainedModel
from m4train.models.products import Linear
from m4train.models.resampler import IdeficsResampler, resampler_flops
from m4train.models.token_rows import DecoupledEmbedding
from m4train.models.vision import normalise
from m4train.parts import CONNECTOR, CROSS_ATTENTION, EMBEDDINGS, LM_HEAD, TEXT, VISION


class CrossAttention(nn.Module):
    """Attention of tokens (Q, H) to image features (images * n, Hv); a layer calls it as a whole only if it is watched
    (hooks.py)."""

    def __init__(self, config: IdeficsConfig, layer: int) -> None:
        super().__init__()
        size, image_size = config.hidden_size, config.vision_config.embed_dim
        self.layer = layer
        self.head_dim, self.dropout = size // config.num_attention_heads, config.dropout
        self.q_proj = Linear(size, size, bias=False)
        self.k_proj = Linear(image_size, size, bias=False)
        self.v_proj = Linear(image_size, size, bias=False)
        self.o_proj = Linear(size, size, bias=False)

        def norm() -> nn.Module:
            return (
                RMSNorm(self.head_dim, config.rms_norm_eps, weight_first=True)
                if config.qk_layer_norms
                else nn.Identity()
            )

        self.q_layer_norm = norm()
        self.k_layer_norm = norm()

    def forward(self, rows: Tensor, features: Tensor | None, cross: CrossContext) -> Tensor:
        """Tokens (Q, H) that see an image -> (Q, H); without `features` those of the cache are used."""
        kept = self.kept(features, cross, self.keys)
        mixed = cross(self.queries(rows), *kept, self.dropout if self.training else 0.0)
        return self.o_proj(mixed.flatten(1))

    def queries(self, rows: Tensor) -> Tensor:
        """Tokens (Q, H) -> (Q, heads, head_dim)."""
        return self.q_layer_norm(self.q_proj(rows).unflatten(-1, (-1, self.head_dim)))

    def keys(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Image features (images * n, Hv) -> keys and values (images * n, heads, head_dim)."""
        key = self.k_layer_norm(self.k_proj(features).unflatten(-1, (-1, self.head_dim)))
        return key, self.v_proj(features).unflatten(-1, (-1, self.head_dim))

    def kept(
        self, features: Tensor | None, cross: CrossContext, keys: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (images * n, heads, head_dim), through the cache if there is one; `keys` makes them as `keys` here does
        of features (images * n, Hv)."""
        if features is None:
            assert cross.cache is not None
            return cross.cache.cross[self.layer]
        made = keys(features)
        if cross.cache is not None:
            cross.cache.cross[self.layer] = made
        return made


class GatedCrossAttentionLayer(nn.Module):
    """Cross-attention, for the tokens that see an image, and an MLP, for all; each behind the tanh of a learned gate."""

    regions = ("before", "keys", "after", "dense")  # what training/compiling.py compiles

    def __init__(self, config: IdeficsConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        shape = (1,) if config.alpha_type == "float" else (1, 1, config.hidden_size)
        self.cross_attn = CrossAttention(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, act=config.hidden_act)
        self.input_layernorm = text_norm(config.text_config)
        self.post_attention_layernorm = text_norm(config.text_config)
        self.alpha_cross_attn = nn.Parameter(torch.empty(shape))
        self.alpha_dense = nn.Parameter(torch.empty(shape))

    def forward(self, hidden: Tensor, features: Tensor | None, cross: CrossContext | None) -> Tensor:
        """(T, H) -> (T, H); without `cross` no token sees an image; without `features` those of the cache are used."""
        if cross is not None:
            rows = hidden.index_select(0, cross.tokens)
            if is_watched(self.cross_attn):
                added = self._gated(self.cross_attn(self.input_layernorm(rows), features, cross))
            else:
                query, kept = self.before(rows), self.cross_attn.kept(features, cross, self.keys)
                added = self.after(cross(query, *kept, self.cross_attn.dropout if self.training else 0.0))
            hidden = hidden.index_add(0, cross.tokens, added.to(hidden.dtype))
        return self.dense(hidden)

    def before(self, rows: Tensor) -> Tensor:
        """Tokens (Q, H) that see an image -> queries (Q, heads, head_dim)."""
        return self.cross_attn.queries(self.input_layernorm(rows))

    def keys(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Image features (images * n, Hv) -> see `CrossAttention.keys`."""
        return self.cross_attn.keys(features)

    def after(self, mixed: Tensor) -> Tensor:
        """What attention gives (Q, heads, head_dim) -> what it adds to these tokens (Q, H)."""
        return self._gated(self.cross_attn.o_proj(mixed.flatten(1)))

    def _gated(self, attended: Tensor) -> Tensor:
        return self.alpha_cross_attn.flatten().tanh() * self._drop(attended)

    def dense(self, hidden: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        mixed = self._drop(self.mlp(self.post_attention_layernorm(hidden)))
        return hidden + self.alpha_dense.flatten().tanh() * mixed

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class IdeficsModel(ModelDoors, PretrainedModel):
    """The model without head.

    `forward` takes a `PackedBatch` and returns hidden states (T, H); or the documented padded arguments, among them
    `pixel_values` (B, N, 3, H, W), or `image_encoder_embeddings` or `perceiver_embeddings` (B, N, n, Hv) in their place, and
    `image_attention_mask` (B, T, N), 1 where a token sees an image. The first of its `hidden_states` are the embeddings, as
    documented and in transformers 4; release 5 gives there what the first gated layer made of them.
    """

    config_class: ClassVar[type[PretrainedConfig]] = IdeficsConfig
    checkpoint_prefix = "model."
    embedding_name: ClassVar[str] = "embed_tokens"
    image_arguments = (
        "pixel_values",
        "image_encoder_embeddings",
        "perceiver_embeddings",
        "image_attention_mask",
        "interpolate_pos_encoding",
    )
    documented_order: ClassVar[tuple[str, ...]] = (
        *image_arguments[:4],
        *OUTPUTS,
        "interpolate_pos_encoding",
        "return_dict",
    )

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__(config)
        text: LlamaConfig = config.text_config
        assert text.head_dim is not None
        self.embed_tokens = DecoupledEmbedding(config.vocab_size, config.additional_vocab_size, config.hidden_size)
        self.vision_model = ClipTower(config.vision_config)
        if config.use_resampler:
            self.perceiver_resampler = IdeficsResampler(config.perceiver_config, config.vision_config.embed_dim)
        self.layers = nn.ModuleList([DecoderLayer(text) for _ in range(config.num_hidden_layers)])
        count = config.num_hidden_layers // config.cross_layer_interval
        self.gated_cross_attn_layers = nn.ModuleList([GatedCrossAttentionLayer(config, i) for i in range(count)])
        self.norm = text_norm(text)
        self.rotary = Rotary(text.head_dim, text.rope_theta)
        self.init_weights()
        self._freeze()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (...,) -> embeddings (..., H)."""
        return self.embed_tokens(input_ids)

    def get_image_features(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Features (images, n, Hv) of images (B, N, 3, H, W) or (images, 3, H, W), in reading order."""
        frames = pixel_values.flatten(0, -4).to(self.dtype)
        return self.image_features(frames, interpolate_pos_encoding).unflatten(0, (frames.shape[0], -1))

    def image_features(self, frames: Tensor, interpolate: bool = False) -> Tensor:
        """Normalised frames (F, 3, H, W) -> (F * n, Hv), in one call of the tower."""
        features = self.vision_model(frames, interpolate)
        return self.resample(features, frames.shape[0]) if self.config.use_resampler else features

    def resample(self, features: Tensor, count: int) -> Tensor:
        """Tower outputs (count * n, Hv) of `count` images -> (count * latents, Hv)."""
        segments = Segments.uniform(count, features.shape[0] // count, features.device)
        return self.perceiver_resampler(features, segments)

    def forward_packed(self, batch: PackedBatch) -> Tensor:
        """Hidden states (T, H) after the last norm."""
        features, cross = None, None
        if batch.images is not None:
            images: PackedImages = batch.images
            if batch.cross is None and images.count:
                raise DataError(
                    f"the batch has {images.count} images but does not say which tokens see them: rebuild it with the "
                    "processor of this model"
                )
            features = self.image_features(normalise(images.pixels, images.pixel_table))
            seen = CrossSegments.none(batch.device) if batch.cross is None else batch.cross.to(batch.device)
            cross = CrossContext(seen, features.shape[0] // images.pixels.shape[0])
        context = PackedContext(self.rotary.tables(batch.position_ids), batch.segments)
        return self._run(self.embed(batch.input_ids), context, features, cross)

    def _run(
        self,
        hidden: Tensor,
        context: Any,
        features: Tensor | None,
        cross: CrossContext | None,
        record: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        for i, layer in enumerate(self.layers):
            if record is not None:
                hidden = record(hidden)
            if i % self.config.cross_layer_interval == 0:
                hidden = self.gated_cross_attn_layers[i // self.config.cross_layer_interval](hidden, features, cross)
            hidden = layer(hidden, LayerContext(context, i))
        hidden = self.norm(hidden)
        if record is not None:
            hidden = record(hidden)
        return hidden

    def default_positions(self, mask: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Positions (B, T) from the mask (B, T): a token's place among the real ones of its row; 1 at padding."""
        positions = mask.long().cumsum(1) - 1
        if cache is not None and cache.mask is not None:
            positions = positions + cache.mask.sum(1, keepdim=True)
        return positions.masked_fill(~mask, 1)

    def run_padded(self, inputs: PaddedInputs) -> tuple[Tensor, Tensor | None]:
        """Hidden states (tokens, H), and the image features that were used (B, N, n, Hv)."""
        features, cross, shown = padded_images(self, inputs)
        return self._run(inputs.hidden, inputs.context, features, cross, inputs.record), shown

    def _freeze(self) -> None:
        config = self.config
        if config.freeze_text_layers:
            self.embed_tokens.weight.requires_grad_(False)
            freeze([self.layers, self.norm], config.freeze_text_module_exceptions, "freeze_text_module_exceptions")
        if config.freeze_vision_layers:
            freeze([self.vision_model], config.freeze_vision_module_exceptions, "freeze_vision_module_exceptions")

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch; see `init_idefics`."""
        init_idefics(self, generator)


class IdeficsForVisionText2Text(MultimodalLM):
    """The model with its language-model head; see `MultimodalLM`.

    `vision_model`, if given, takes the place of the vision tower, with its weights.
    """

    config_class: ClassVar[type[PretrainedConfig]] = IdeficsConfig
    shares_beginnings = False  # what a later token sees of the images is said for each column
    embedding_name = "model.embed_tokens"
    documented_order: ClassVar[tuple[str, ...]] = (
        *IdeficsModel.image_arguments[:4],
        "labels",
        *OUTPUTS,
        "interpolate_pos_encoding",
        "return_dict",
        "logits_to_keep",
    )

    def __init__(self, config: IdeficsConfig, vision_model: ClipTower | None = None) -> None:
        PretrainedModel.__init__(self, config)
        self.model = IdeficsModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, config.additional_vocab_size)
        self.tie_weights()
        self.init_weights()
        if vision_model is not None:
            self.model.vision_model = vision_model
            self.model._freeze()
        if config.freeze_lm_head:
            self.lm_head.weight.requires_grad_(False)

    def backbone_parts(self) -> dict[str, tuple[str, ...]]:
        resampler = {CONNECTOR: ("model.perceiver_resampler.",)} if self.config.use_resampler else {}
        return {
            VISION: ("model.vision_model.",),
            **resampler,
            CROSS_ATTENTION: ("model.gated_cross_attn_layers.",),
            TEXT: ("model.layers.", "model.norm."),
        }

    def blocks(self) -> dict[str, list[nn.Module]]:
        resampler = {CONNECTOR: [self.model.perceiver_resampler]} if self.config.use_resampler else {}
        return {
            VISION: list(self.model.vision_model.encoder.layers),
            **resampler,
            CROSS_ATTENTION: list(self.model.gated_cross_attn_layers),
            TEXT: list(self.model.layers),
        }

    def flops(self, batch: PackedBatch) -> dict[str, float]:
        config = self.config
        frames = 0 if batch.images is None else batch.images.pixels.shape[0]
        resampler = {}
        if config.use_resampler:
            lengths = (config.vision_config.grid**2 + 1,) * frames
            flops = resampler_flops(config.perceiver_config, config.vision_config.embed_dim, lengths)
            resampler = {CONNECTOR: flops}
        return {
            VISION: clip_flops(config.vision_config, frames),
            **resampler,
            CROSS_ATTENTION: cross_attention_flops(config, batch, frames),
            EMBEDDINGS: 0.0,
            TEXT: decoder_flops(config.text_config, batch.segments.lengths),
            LM_HEAD: 2.0 * batch.loss_tokens * config.hidden_size * config.token_rows,
        }

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.model.init_weights(generator)
        if not self.config.tie_word_embeddings:
            fill_normal(self.lm_head.weight, self.config.initializer_range, generator)
            if self.lm_head.additional_fc is not None:
                fill_normal(self.lm_head.additional_fc.weight, self.config.hidden_size**-0.5, generator)

    def next_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """New tokens see what the last one of the prompt saw."""
        mask = inputs.get("image_attention_mask")
        return {} if mask is None else {"image_attention_mask": mask[:, -1:]}


def cross_attention_flops(config: IdeficsConfig, batch: PackedBatch, frames: int) -> float:
    """Forward FLOPs of the gated cross-attention layers."""
    size, vision = config.hidden_size, config.vision_config
    queries, pairs = 0, 0
    if batch.cross is not None:
        queries = batch.cross.queries.total
        pairs = (
            sum(q * k for q, k in zip(batch.cross.queries.lengths, batch.cross.seen.lengths)) * config.tokens_per_image
        )
    weights = batch.tokens * 3 * size * config.intermediate_size + queries * 2 * size * size
    weights += frames * config.tokens_per_image * 2 * vision.embed_dim * size
    layers = config.num_hidden_layers // config.cross_layer_interval
    return layers * (2.0 * weights + 4.0 * pairs * size)
