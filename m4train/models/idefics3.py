"""Idefics3 and SmolVLM: SigLIP frames, pixel shuffle, a linear projection, a Llama decoder."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from m4train.batch import PackedImages, Segments
from m4train.errors import ConfigError, DataError
from m4train.models.configuration import PretrainedConfig
from m4train.models.decoder import Decoder
from m4train.models.initialisation import fill_normal, init_modules
from m4train.models.model_configs import Idefics3Config, SmolVLMConfig
from m4train.models.multimodal import MultimodalLM, MultimodalModel
from m4train.models.products import Linear
from m4train.models.vision import (
    PatchAttention,
    VisionTower,
    cut_patches,
    masked_positions,
    normalise,
    vision_flops,
)


class Projection(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.proj = Linear(size, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., out)."""
        return self.proj(x)


class Connector(nn.Module):
    """(F, g * g, Hv) patch features -> (F * (g / s)^2, H): s x s neighbours become one token."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        self.scale_factor = config.scale_factor
        size = config.vision_config.hidden_size * config.scale_factor**2
        self.modality_projection = Projection(size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(F, g * g, Hv) -> (F * (g / s)^2, H)."""
        return self.modality_projection(pixel_shuffle(features, self.scale_factor).flatten(0, 1))


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """(F, g * g, C) -> (F, (g / s)^2, C * s^2); within a cell the order is top-left, top-right, bottom-left, bottom-right.

    Raises:
        ConfigError: `factor` does not divide the grid.
    """
    grid = math.isqrt(features.shape[1])
    if grid % factor:
        raise ConfigError(
            f"a frame has {grid} patches per side, which scale_factor {factor} does not divide: change image_size, patch_size "
            "or scale_factor"
        )
    side = grid // factor
    cells = features.unflatten(1, (side, factor, side, factor))  # (F, row, dy, column, dx, C)
    return cells.transpose(2, 3).flatten(3).flatten(1, 2)


class Idefics3Model(MultimodalModel):
    """See `MultimodalModel`; images are square frames of the size of the tower."""

    config_class: ClassVar[type[PretrainedConfig]] = Idefics3Config

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__(config)
        self.vision_model = VisionTower(config.vision_config)
        self.connector = Connector(config)
        self.text_model = Decoder(config.text_config)
        self.init_weights()

    def image_features(self, images: PackedImages) -> Tensor:
        """Features (F * tokens_per_image, H) of frames (F, 3, S, S).

        Raises:
            DataError: the frames do not have the size of the tower.
        """
        vision, frames = self.config.vision_config, images.pixels
        if tuple(frames.shape[1:]) != (3, vision.image_size, vision.image_size):
            raise DataError(
                f"frames have shape {tuple(frames.shape[1:])}, but the vision tower takes (3, {vision.image_size}, "
                f"{vision.image_size}): use the image processor of this model"
            )
        count, patches = frames.shape[0], vision.grid**2
        if images.patch_mask is None:
            position_ids = torch.arange(patches, device=frames.device).repeat(count)
        else:
            position_ids = masked_positions(images.patch_mask.unflatten(1, (vision.grid, vision.grid)), vision.grid)
        attend = PatchAttention(Segments.uniform(count, patches, frames.device), images.patch_mask)
        pixels = cut_patches(normalise(frames, images.pixel_table), vision.patch_size)
        features = self.vision_model(pixels, position_ids, attend)
        return self.connector(features.unflatten(0, (count, patches)))

    def pack(self, images: Tensor, mask: Tensor | None) -> PackedImages:
        """Frames (I, 3, H, W), with the real patches (I, patches) by `mask` (I, H, W)."""
        patch_mask = None
        if mask is not None:
            size = self.config.vision_config.patch_size
            # A patch is real if any of its pixels is.
            patch_mask = mask.unfold(1, size, size).unfold(2, size, size).flatten(3).any(-1).flatten(1)
        return PackedImages(images, images.shape[0], patch_mask=patch_mask)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch: normal, biases 0, norms 1."""
        init_modules(self, self.config.initializer_range, generator)
        size = self.config.text_config.hidden_size
        fill_normal(self.text_model.embed_tokens.weight, size**-0.5, generator)
        fill_normal(self.connector.modality_projection.proj.weight, (0.4 / size) ** 0.5, generator)


class Idefics3ForConditionalGeneration(MultimodalLM):
    """See `MultimodalLM`."""

    config_class: ClassVar[type[PretrainedConfig]] = Idefics3Config
    model_class: ClassVar[type[MultimodalModel]] = Idefics3Model

    def image_flops(self, images: PackedImages) -> tuple[float, float]:
        vision, frames = self.config.vision_config, images.pixels.shape[0]
        projection = vision.hidden_size * self.config.scale_factor**2 * self.config.text_config.hidden_size
        connector = 2.0 * frames * self.config.tokens_per_image * projection
        return vision_flops(vision, (vision.grid**2,) * frames), connector


class SmolVLMModel(Idefics3Model):
    config_class = SmolVLMConfig


class SmolVLMForConditionalGeneration(Idefics3ForConditionalGeneration):
    config_class = SmolVLMConfig
    model_class = SmolVLMModel
