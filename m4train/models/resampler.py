"""Perceiver resamplers on packed images: any number of patches per image becomes a fixed number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m4train.batch import Segments
from m4train.models.attention import attention
from m4train.models.hooks import is_watched
from m4train.models.layers import GatedMLP, RMSNorm
from m4train.models.model_configs import Idefics2PerceiverConfig, IdeficsPerceiverConfig
from m4train.models.products import Linear
from m4train.models.uncompiled import uncompiled

Slots = tuple[Tensor, Tensor]


class LatentContext:
    """Which keys the latents of each image see: its patches, then its latents.

    Made on the device from the segment lengths, once per forward pass, without waiting for it.

    Args:
        patches: of the images.
        latents: how many an image has.
    """

    def __init__(self, patches: Segments, latents: int) -> None:
        device, count = patches.cu_seqlens.device, len(patches)
        images = torch.arange(count, device=device)
        starts = patches.cu_seqlens[:-1].long() + images * latents
        of_patch = torch.repeat_interleave(images, patches.cu_seqlens.diff().long(), output_size=patches.total)
        patch_slots = torch.arange(patches.total, device=device) + of_patch * latents
        ends = patches.cu_seqlens[1:].long() + images * latents
        latent_slots = (ends[:, None] + torch.arange(latents, device=device)).flatten()
        self.slots = patch_slots, latent_slots  # places of the patches (P,) and of the latents (I * n,) among the keys
        self.queries = Segments.uniform(count, latents, device)
        sums = torch.cat((starts, ends[-1:] + latents)).int()
        self.keys = Segments(tuple(n + latents for n in patches.lengths), sums)

    @uncompiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(I * n, heads, head_dim) queries; (P + I * n, kv_heads, head_dim) keys and values; weights drop out."""
        return attention(query, key, value, self.queries, self.keys, dropout=dropout)


def interleave(patches: Tensor, latents: Tensor, slots: Slots) -> Tensor:
    """Patches (P, ...) and latents (I * n, ...) -> (P + I * n, ...), image by image."""
    out = patches.new_empty(patches.shape[0] + latents.shape[0], *patches.shape[1:])
    return out.index_copy(0, slots[0], patches).index_copy(0, slots[1], latents.to(out.dtype))


@uncompiled
def spread(latents: Tensor, patches: Segments) -> tuple[Tensor, LatentContext]:
    """The latents (n, C) of each image, (I * n, C), and what they see."""
    return latents.repeat(len(patches), 1), LatentContext(patches, latents.shape[0])


class GroupedLatentAttention(nn.Module):
    """Attention of latents to patches and latents, with grouped keys (Idefics2); a layer calls it as a whole only if it is
    watched (hooks.py)."""

    def __init__(self, config: Idefics2PerceiverConfig) -> None:
        super().__init__()
        size, self.head_dim, self.dropout = config.hidden_size, config.resampler_head_dim, config.attention_dropout
        query_size, key_size = config.resampler_n_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(size, query_size, bias=False)
        self.k_proj = Linear(size, key_size, bias=False)
        self.v_proj = Linear(size, key_size, bias=False)
        self.o_proj = Linear(query_size, size, bias=False)

    def forward(self, latents: Tensor, patches: Tensor, context: LatentContext) -> Tensor:
        """Latents (I * n, H) and patches (P, H) -> (I * n, H)."""
        mixed = context(*self.project(latents, patches, context.slots), self.dropout if self.training else 0.0)
        return self.o_proj(mixed.flatten(1))

    def project(self, latents: Tensor, patches: Tensor, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (I * n, H) and patches (P, H) -> queries (I * n, heads, head_dim), keys and values (P + I * n, kv_heads, head_dim)."""
        keys = interleave(patches, latents, slots)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection, x in ((self.q_proj, latents), (self.k_proj, keys), (self.v_proj, keys))
        )
        return query, key, value


class PerceiverLayer(nn.Module):
    regions = ("before", "after")  # what training/compiling.py compiles

    def __init__(self, config: Idefics2PerceiverConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_latents_norm = RMSNorm(size, eps)
        self.input_context_norm = RMSNorm(size, eps)
        self.self_attn = GroupedLatentAttention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, 4 * size, act=config.hidden_act)

    def forward(self, latents: Tensor, patches: Tensor, context: LatentContext) -> Tensor:
        """Latents (I * n, H) and patches (P, H) -> latents (I * n, H)."""
        if is_watched(self.self_attn):
            normed = self.input_latents_norm(latents), self.input_context_norm(patches)
            return self._finish(latents, self.self_attn(*normed, context))
        query, key, value = self.before(latents, patches, context.slots)
        return self.after(latents, context(query, key, value, self.self_attn.dropout if self.training else 0.0))

    def before(self, latents: Tensor, patches: Tensor, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (I * n, H) and patches (P, H) -> what attention takes, see `GroupedLatentAttention.project`."""
        return self.self_attn.project(self.input_latents_norm(latents), self.input_context_norm(patches), slots)

    def after(self, latents: Tensor, mixed: Tensor) -> Tensor:
        """Latents (I * n, H) and what attention gives (I * n, heads, head_dim) -> latents (I * n, H)."""
        return self._finish(latents, self.self_attn.o_proj(mixed.flatten(1)))

    def _finish(self, latents: Tensor, attended: Tensor) -> Tensor:
        latents = latents + attended
        return latents + self.mlp(self.post_attention_layernorm(latents))


class PerceiverResampler(nn.Module):
    """The perceiver of Idefics2: patches (P, H) of I images -> (I * latents, H)."""

    def __init__(self, config: Idefics2PerceiverConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.resampler_n_latents, config.hidden_size))
        self.layers = nn.ModuleList([PerceiverLayer(config) for _ in range(config.resampler_depth)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, patches: Tensor, segments: Segments) -> Tensor:
        """Patches (P, H), in `segments` of one image each -> (I * latents, H)."""
        latents, context = spread(self.latents, segments)
        for layer in self.layers:
            latents = layer(latents, patches, context)
        return self.norm(latents)


class LatentAttention(nn.Module):
    """Latents attend to patches and latents, both layer-normed, with optional norms of queries and keys (Idefics)."""

    regions = ("before",)  # what training/compiling.py compiles

    def __init__(self, size: int, heads: int, head_dim: int, qk_norms: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.context_layer_norm = nn.LayerNorm(size)
        self.latents_layer_norm = nn.LayerNorm(size)
        self.q_layer_norm = nn.LayerNorm(head_dim) if qk_norms else nn.Identity()
        self.k_layer_norm = nn.LayerNorm(head_dim) if qk_norms else nn.Identity()
        self.q_proj = Linear(size, heads * head_dim, bias=False)
        self.k_proj = Linear(size, heads * head_dim, bias=False)
        self.v_proj = Linear(size, heads * head_dim, bias=False)
        self.output_proj = Linear(heads * head_dim, size, bias=False)

    def forward(self, latents: Tensor, patches: Tensor, context: LatentContext) -> Tensor:
        """Latents (I * n, Hv) and patches (P, Hv) -> (I * n, Hv)."""
        return self.output_proj(context(*self.before(latents, patches, context.slots)).flatten(1))

    def before(self, latents: Tensor, patches: Tensor, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (I * n, Hv) and patches (P, Hv) -> queries (I * n, heads, head_dim), keys and values (P + I * n, ...)."""
        latents = self.latents_layer_norm(latents)
        keys = interleave(self.context_layer_norm(patches), latents, slots)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection, x in ((self.q_proj, latents), (self.k_proj, keys), (self.v_proj, keys))
        )
        return self.q_layer_norm(query), self.k_layer_norm(key), value


class ReluMLP(nn.Module):
    regions = ("forward",)  # what training/compiling.py compiles

    def __init__(self, size: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(size)
        self.fc = Linear(size, 4 * size, bias=False)
        self.c_proj = Linear(4 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return self.c_proj(self.fc(self.ln(x)).relu())


class IdeficsResampler(nn.Module):
    """The resampler of Idefics: patches (P, Hv) of I images -> (I * latents, Hv)."""

    def __init__(self, config: IdeficsPerceiverConfig, size: int) -> None:
        super().__init__()
        heads, head_dim = config.resampler_n_heads, config.resampler_head_dim
        self.latents = nn.Parameter(torch.empty(config.resampler_n_latents, size))
        self.blocks = nn.ModuleList(
            [
                nn.ModuleList([LatentAttention(size, heads, head_dim, config.qk_layer_norms_perceiver), ReluMLP(size)])
                for _ in range(config.resampler_depth)
            ]
        )
        self.layer_norm = nn.LayerNorm(size)

    def forward(self, patches: Tensor, segments: Segments) -> Tensor:
        """Patches (P, Hv), in `segments` of one image each -> (I * latents, Hv)."""
        latents, context = spread(self.latents, segments)
        for attend, mlp in self.blocks:
            latents = latents + attend(latents, patches, context)
            latents = latents + mlp(latents)
        return self.layer_norm(latents)


def resampler_flops(config: IdeficsPerceiverConfig, size: int, lengths: tuple[int, ...]) -> float:
    """Forward FLOPs of the resampler of Idefics for images of these numbers of patches."""
    inner, latents = config.resampler_n_heads * config.resampler_head_dim, config.resampler_n_latents
    queries = latents * len(lengths)
    keys = sum(lengths) + queries
    weights = queries * (2 * size * inner + 8 * size * size) + keys * 2 * size * inner
    return float(config.resampler_depth * (2 * weights + 4 * latents * keys * inner))


def perceiver_flops(config: Idefics2PerceiverConfig, lengths: tuple[int, ...]) -> float:
    """Forward FLOPs for images of these numbers of patches."""
    size, latents = config.hidden_size, config.resampler_n_latents
    query_size = config.resampler_n_heads * config.resampler_head_dim
    key_size = config.num_key_value_heads * config.resampler_head_dim
    queries = latents * len(lengths)
    keys = sum(lengths) + queries
    weights = queries * (2 * size * query_size + 12 * size * size) + keys * 2 * size * key_size
    pairs = latents * keys
    return float(config.resampler_depth * (2 * weights + 4 * pairs * query_size))
