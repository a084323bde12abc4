"""The SigLIP vision tower on packed patches: all frames of a batch go through it in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4train.batch import Segments
from m4train.errors import DataError
from m4train.models.attention import attention
from m4train.models.backbone_configs import SiglipVisionConfig
from m4train.models.hooks import is_watched
from m4train.models.layers import Activation, activation
from m4train.models.products import Linear, linear, recomputed
from m4train.models.uncompiled import uncompiled


class PatchAttention:
    """Which patches see each other: all of one segment, or, with `mask`, all real patches of a frame.

    `mask` (F, P) bool, True where a patch is real. Masked patches still give (unread) outputs, so every frame keeps P rows.
    """

    def __init__(self, segments: Segments, mask: Tensor | None = None) -> None:
        self.segments = segments
        self.mask = mask

    @uncompiled
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """(T, heads, head_dim) three times -> the same; weights drop out."""
        if self.mask is None:
            return attention(query, key, value, self.segments, self.segments, dropout=dropout)
        q, k, v = (x.unflatten(0, (len(self.segments), -1)).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:, None, None], dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(0, 1)


class PatchEmbedding(nn.Conv2d):
    """The patch convolution of the checkpoints, applied to patches already cut: (T, 3, p, p) -> (T, size)."""

    def __init__(self, patch_size: int, size: int, bias: bool = True) -> None:
        super().__init__(3, size, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(T, 3, p, p) -> (T, size)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config.patch_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        """Patches (T, 3, p, p) and position ids (T,) -> (T, Hv)."""
        return self.patch_embedding(patches) + self.position_embedding(position_ids)


class VisionAttention(nn.Module):
    """Self-attention; a layer calls it as a whole only if it is watched (hooks.py)."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, size // heads, dropout
        self.q_proj = Linear(size, size)
        self.k_proj = Linear(size, size)
        self.v_proj = Linear(size, size)
        self.out_proj = Linear(size, size)

    def forward(self, hidden: Tensor, attend: PatchAttention) -> Tensor:
        """(T, Hv) -> (T, Hv); `attend` says which patches see each other."""
        mixed = attend(*self.project(hidden), self.dropout if self.training else 0.0)
        return self.out_proj(mixed.flatten(1))

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, Hv) -> queries, keys and values (T, heads, head_dim)."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value


class LayerNorm(nn.LayerNorm):
    """A `nn.LayerNorm` whose output linear layers recompute rather than keep."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        normed = super().forward(x)
        return recomputed(normed, self._again, x, self.weight, self.bias)

    def _again(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class VisionMLP(nn.Module):
    def __init__(self, size: int, inner: int, act: Activation) -> None:
        super().__init__()
        self.fc1 = Linear(size, inner)
        self.fc2 = Linear(inner, size)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        inner = self.fc1(x)
        return self.fc2(recomputed(self.act(inner), self.act, inner))


class VisionLayer(nn.Module):
    """Pre-norm transformer block with biases; `dropout` is that of attention weights."""

    regions = ("before", "after")  # what training/compiling.py compiles

    def __init__(self, size: int, inner: int, heads: int, act: Activation, eps: float, dropout: float) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(size, eps=eps)
        self.self_attn = VisionAttention(size, heads, dropout)
        self.layer_norm2 = LayerNorm(size, eps=eps)
        self.mlp = VisionMLP(size, inner, act)

    def forward(self, hidden: Tensor, attend: PatchAttention) -> Tensor:
        """(T, Hv) -> (T, Hv); `attend` says which patches see each other."""
        if is_watched(self.self_attn):
            return self._finish(hidden, self.self_attn(self.layer_norm1(hidden), attend))
        query, key, value = self.before(hidden)
        return self.after(hidden, attend(query, key, value, self.self_attn.dropout if self.training else 0.0))

    def before(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, Hv) -> what attention takes, see `VisionAttention.project`."""
        return self.self_attn.project(self.layer_norm1(hidden))

    def after(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """(T, Hv) and what attention gives (T, heads, head_dim) -> (T, Hv)."""
        return self._finish(hidden, self.self_attn.out_proj(mixed.flatten(1)))

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + attended
        return hidden + self.mlp(self.layer_norm2(hidden))


class VisionEncoder(nn.Module):
    """The stack of blocks, under the name the checkpoints give it."""

    def __init__(self, layers: list[VisionLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, attend: PatchAttention) -> Tensor:
        """(T, Hv) -> (T, Hv)."""
        for layer in self.layers:
            hidden = layer(hidden, attend)
        return hidden


class VisionTower(nn.Module):
    """Patches (T, 3, p, p) with their position ids (T,) -> normed features (T, Hv)."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        size, eps, inner, heads = (
            config.hidden_size,
            config.layer_norm_eps,
            config.intermediate_size,
            config.num_attention_heads,
        )
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(
            [
                VisionLayer(size, inner, heads, config.hidden_act, eps, config.attention_dropout)
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.post_layernorm = nn.LayerNorm(size, eps=eps)

    def forward(self, patches: Tensor, position_ids: Tensor, attend: PatchAttention) -> Tensor:
        """Patches (T, 3, p, p) and position ids (T,) -> (T, Hv)."""
        hidden = self.embeddings(patches.to(self.post_layernorm.weight.dtype), position_ids)
        return self.post_layernorm(self.encoder(hidden, attend))


def normalise(pixels: Tensor, table: Tensor | None) -> Tensor:
    """Looks up uint8 `pixels` (N, 3, h, w) in `table` (3, 256); floating-point pixels, without a table, pass through.

    Raises:
        DataError: bytes without a table, or a table for what is normalised already.
    """
    if (table is None) != pixels.is_floating_point():
        given = "no pixel_table" if table is None else "a pixel_table"
        raise DataError(f"pixels are {pixels.dtype} with {given}: give uint8 with a table, or normalised ones without")
    if table is None:
        return pixels
    # One table of 768 levels, so that all channels are one lookup.
    offsets = torch.arange(0, 768, 256, dtype=torch.int32, device=pixels.device)[:, None, None]
    return table.flatten()[pixels + offsets]


def cut_patches(frames: Tensor, patch_size: int) -> Tensor:
    """(F, 3, H, W) -> (F * rows * columns, 3, p, p), row by row; pixels beyond the last whole patch are dropped."""
    rows, columns = frames.shape[2] // patch_size, frames.shape[3] // patch_size
    whole = frames[:, :, : rows * patch_size, : columns * patch_size]
    cells = whole.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def masked_positions(mask: Tensor, grid: int) -> Tensor:
    """Position ids (F * g * g,) of frames whose real patches, by `mask` (F, g, g), fill a top-left rectangle.

    The rectangle is stretched over the table of `grid` x `grid` positions; patches outside it get position 0.
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    rows = steps * grid // mask[:, :, 0].sum(1, keepdim=True).clamp(min=1)
    columns = steps * grid // mask[:, 0].sum(1, keepdim=True).clamp(min=1)
    return ((rows[:, :, None] * grid + columns[:, None]) * mask).flatten()


def vision_flops(config: SiglipVisionConfig, lengths: tuple[int, ...]) -> float:
    """Forward FLOPs of the tower for images of these numbers of patches."""
    cut = 2.0 * 3 * config.patch_size**2 * config.hidden_size * sum(lengths)
    return cut + encoder_flops(config.hidden_size, config.intermediate_size, config.num_hidden_layers, lengths)


def encoder_flops(size: int, inner: int, layers: int, lengths: tuple[int, ...]) -> float:
    """Forward FLOPs of bidirectional blocks for segments of these lengths."""
    per_token = 2.0 * (4 * size * size + 2 * size * inner)
    return layers * (per_token * sum(lengths) + 4.0 * size * sum(n * n for n in lengths))
