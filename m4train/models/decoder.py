"""The Llama decoder on the packed form; what a layer attends to is decided by the context it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from m4train.models.backbone_configs import LlamaConfig
from m4train.models.hooks import is_watched
from m4train.models.layers import GatedMLP, RMSNorm, Rotary, rotate
from m4train.models.products import Linear, flattened
from m4train.models.uncompiled import uncompiled

Tables = tuple[Tensor, Tensor]  # of `Rotary`


class AttentionContext(Protocol):
    """What is common to the attention of all layers in one forward pass (see `contexts.py`)."""

    tables: Tables

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(T, heads, head_dim), (T, kv_heads, head_dim) twice -> (T, heads, head_dim); weights drop out."""
        ...


class LayerContext:
    """An `AttentionContext` as one layer sees it.

    It is handed to the blocks as one opaque object, so that wrappers which cast or move tensor arguments leave its fp32
    tables alone, and holds the number of the layer.
    """

    def __init__(self, context: AttentionContext, layer: int) -> None:
        self.tables = context.tables
        self._context, self._layer = context, layer

    @uncompiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(T, heads, head_dim), (T, kv_heads, head_dim) twice -> (T, heads, head_dim); weights drop out."""
        return self._context(self._layer, query, key, value, dropout)


class SelfAttention(nn.Module):
    """Rotary self-attention with grouped keys and values; a layer calls it as a whole only if it is watched (hooks.py)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """(T, H) -> (T, H); `context` says which tokens see each other."""
        mixed = context(*self.project(hidden, context.tables), self.dropout if self.training else 0.0)
        return self.o_proj(flattened(mixed))

    def project(self, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H) -> queries (T, heads, head_dim), keys and values (T, kv_heads, head_dim); rotated, save the values."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, tables), rotate(key, tables), value


def text_norm(config: LlamaConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_weight_first)


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP, each with its residual."""

    regions = ("before", "after")  # what training/compiling.py compiles

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.dropout = config.residual_dropout
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, act=config.hidden_act)
        self.input_layernorm = text_norm(config)
        self.post_attention_layernorm = text_norm(config)

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """(T, H) -> (T, H); `context` says which tokens see each other."""
        if is_watched(self.self_attn):
            return self._finish(hidden, self.self_attn(self.input_layernorm(hidden), context))
        query, key, value = self.before(hidden, context.tables)
        return self.after(hidden, context(query, key, value, self.self_attn.dropout if self.training else 0.0))

    def before(self, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H) -> what attention takes, see `SelfAttention.project`."""
        return self.self_attn.project(self.input_layernorm(hidden), tables)

    def after(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """(T, H) and what attention gives (T, heads, head_dim) -> (T, H)."""
        return self._finish(hidden, self.self_attn.o_proj(flattened(mixed)))

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self._drop(attended)
        return hidden + self._drop(self.mlp(self.post_attention_layernorm(hidden)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Decoder(nn.Module):
    """Token embedding, decoder layers and final norm, under the names of a Llama checkpoint."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = text_norm(config)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)

    def forward(
        self, hidden: Tensor, context: AttentionContext, record: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """(T, H) embeddings -> (T, H) normed hidden states; `record` collects the input of each layer and the output."""
        for i, layer in enumerate(self.layers):
            if record is not None:
                hidden = record(hidden)
            hidden = layer(hidden, LayerContext(context, i))
        hidden = self.norm(hidden)
        if record is not None:
            hidden = record(hidden)
        return hidden


def decoder_flops(config: LlamaConfig, lengths: Sequence[int]) -> float:
    """Forward FLOPs of the layers for causal segments of these lengths (a multiply-add counts two)."""
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    weights = size * config.head_dim * 2 * (heads + kv_heads) + 3 * size * config.intermediate_size
    pairs = sum(causal_pairs(n, config.window) for n in lengths)
    return config.num_hidden_layers * (2.0 * sum(lengths) * weights + 4.0 * pairs * heads * config.head_dim)


def causal_pairs(length: int, window: int | None) -> int:
    """How many (query, key) pairs a causal segment has."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
