"""The CLIP vision tower of Idefics, on frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m4train.batch import Segments
from m4train.errors import DataError
from m4train.models.layers import stretch_positions
from m4train.models.model_configs import IdeficsVisionConfig
from m4train.models.vision import (
    PatchAttention,
    PatchEmbedding,
    VisionEncoder,
    VisionLayer,
    cut_patches,
    encoder_flops,
)


class ClipEmbeddings(nn.Module):
    """Frames (F, 3, H, W) -> (F, 1 + patches, Hv): the class vector, then the patches, with their positions."""

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.grid = config.image_size, config.patch_size, config.grid
        self.class_embedding = nn.Parameter(torch.empty(config.embed_dim))
        self.patch_embedding = PatchEmbedding(config.patch_size, config.embed_dim, bias=False)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, config.embed_dim)

    def forward(self, frames: Tensor, interpolate: bool) -> Tensor:
        """(F, 3, H, W) -> (F, 1 + patches, Hv); `interpolate` stretches the positions to frames of another size.

        Raises DataError for frames of another size without it.
        """
        count, _, height, width = frames.shape
        fits = height == width == self.image_size
        if not fits and not interpolate:
            raise DataError(
                f"frames are {height} x {width} pixels, but the vision tower takes {self.image_size} x {self.image_size}: use "
                "the image processor of this model, or set interpolate_pos_encoding=True"
            )
        patches = self.patch_embedding(cut_patches(frames, self.patch_size)).unflatten(0, (count, -1))
        first = self.class_embedding.to(patches.dtype).expand(count, 1, -1)
        # Looked up, not read: a sharded table is whole only inside its own forward.
        positions = self.position_embedding(torch.arange(self.grid**2 + 1, device=frames.device))
        # As the reference does, a square frame with pixels to spare beyond the same patches has the same positions.
        if not (height == width and patches.shape[1] == self.grid**2):
            # The tenth of a patch is part of what the scale means for the reference.
            rows, columns = height // self.patch_size, width // self.patch_size
            scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
            positions = torch.cat((positions[:1], stretch_positions(positions[1:], self.grid, scale)))
        return torch.cat((first, patches), dim=1) + positions


class ClipTower(nn.Module):
    """Frames (F, 3, H, W) -> features (F * (1 + patches), Hv), the class vector of a frame first, without final norm."""

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        size, eps, inner, heads = (
            config.embed_dim,
            config.layer_norm_eps,
            config.intermediate_size,
            config.num_attention_heads,
        )
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(size, eps=eps)  # spelled like this in the checkpoints
        self.encoder = VisionEncoder(
            [
                VisionLayer(size, inner, heads, config.hidden_act, eps, config.attention_dropout)
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.post_layernorm = nn.LayerNorm(size, eps=eps)

    def forward(self, frames: Tensor, interpolate: bool = False) -> Tensor:
        """(F, 3, H, W) -> (F * (1 + patches), Hv); see `ClipEmbeddings.forward`."""
        embedded = self.embeddings(frames.to(self.pre_layrnorm.weight.dtype), interpolate)
        count, length = embedded.shape[:2]
        attend = PatchAttention(Segments.uniform(count, length, frames.device))
        hidden = self.encoder(self.pre_layrnorm(embedded.flatten(0, 1)), attend)
        # Nothing reads the final norm of the checkpoints; this gives its parameters a gradient of zeros.
        return torch.cat((hidden, self.post_layernorm(hidden[:1])[:0]))


def clip_flops(config: IdeficsVisionConfig, frames: int) -> float:
    """Forward FLOPs of the tower for frames of the configured size."""
    cut = 2.0 * frames * config.grid**2 * 3 * config.patch_size**2 * config.embed_dim
    lengths = (config.grid**2 + 1,) * frames
    return cut + encoder_flops(config.embed_dim, config.intermediate_size, config.num_hidden_layers, lengths)
