"""Idefics2: SigLIP on images of any shape, a perceiver, a Mistral decoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from m4train.batch import PackedImages, Segments
from m4train.errors import DataError
from m4train.models.arguments import OUTPUTS
from m4train.models.configuration import PretrainedConfig
from m4train.models.decoder import Decoder
from m4train.models.initialisation import fill_normal, init_modules
from m4train.models.layers import GatedMLP
from m4train.models.model_configs import Idefics2Config
from m4train.models.multimodal import MultimodalLM, MultimodalModel
from m4train.models.resampler import PerceiverResampler, perceiver_flops
from m4train.models.vision import PatchAttention, VisionTower, cut_patches, normalise, vision_flops
from m4train.positions import patch_position_ids


class Connector(nn.Module):
    """Patch features (P, Hv) of I images -> (I * latents, H)."""

    regions = ("project",)  # what training/compiling.py compiles

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__()
        text = config.text_config
        self.modality_projection = GatedMLP(
            config.vision_config.hidden_size, text.intermediate_size, text.hidden_size, text.hidden_act
        )
        self.perceiver_resampler = PerceiverResampler(config.perceiver_config)

    def forward(self, features: Tensor, segments: Segments) -> Tensor:
        """Patch features (P, Hv), in `segments` of one image each -> (I * latents, H)."""
        return self.perceiver_resampler(self.project(features), segments)

    def project(self, features: Tensor) -> Tensor:
        """(P, Hv) -> (P, H)."""
        return self.modality_projection(features)


class Idefics2Model(MultimodalModel):
    """See `MultimodalModel`; images are packed patches, each with its position in the table of the tower.

    `position_rounding` chooses how `pack` fits grids into that table (see `patch_position_ids`).
    """

    config_class: ClassVar[type[PretrainedConfig]] = Idefics2Config
    documented_order: ClassVar[tuple[str, ...]] = (
        *MultimodalModel.image_arguments,
        *OUTPUTS,
        "cache_position",
        "return_dict",
    )

    def __init__(self, config: Idefics2Config) -> None:
        super().__init__(config)
        self.position_rounding = "exact"
        self.vision_model = VisionTower(config.vision_config)
        self.connector = Connector(config)
        self.text_model = Decoder(config.text_config)
        self.init_weights()

    def image_features(self, images: PackedImages) -> Tensor:
        """Features (I * tokens_per_image, H) of packed patches (P, 3, p, p).

        Raises:
            DataError: images that are not packed patches of the size of the tower.
        """
        size = self.config.vision_config.patch_size
        if images.patches is None or images.patch_position_ids is None or images.pixels.shape[2] != size:
            raise DataError(
                f"images have shape {tuple(images.pixels.shape)}, but Idefics2 takes packed patches (P, 3, {size}, {size}) "
                "with their numbers per image and their positions: use the processor of this model"
            )
        pixels = normalise(images.pixels, images.pixel_table)
        features = self.vision_model(pixels, images.patch_position_ids, PatchAttention(images.patches))
        return self.connector(features, images.patches)

    def pack(self, images: Tensor, mask: Tensor | None) -> PackedImages:
        """Packed patches (P, 3, p, p) of images (I, 3, H, W), those with real pixels by `mask` (I, H, W) alone."""
        pixels, shapes = _real_patches(images, mask, self.config.vision_config.patch_size)
        positions = [
            patch_position_ids(rows, columns, self.config.vision_config.grid, self.position_rounding)
            for rows, columns in shapes
        ]
        patches = Segments.of([rows * columns for rows, columns in shapes], images.device)
        ids = torch.cat(positions).to(images.device)
        return PackedImages(pixels, len(shapes), patches=patches, patch_position_ids=ids)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch: normal, biases 0, norms 1, latents that differ."""
        init_modules(self, self.config.initializer_range, generator)
        size, depth = self.config.text_config.hidden_size, self.config.perceiver_config.resampler_depth
        std = (0.4 / size) ** 0.5
        fill_normal(self.text_model.embed_tokens.weight, size**-0.5, generator)
        fill_normal(self.connector.perceiver_resampler.latents, size**-0.5, generator)
        for name, module in self.connector.named_modules():
            if isinstance(module, nn.Linear):
                fill_normal(module.weight, std, generator)
                if name == "modality_projection.down_proj":
                    fill_normal(module.weight, std * 2**-0.5, generator)
                elif name.endswith("o_proj"):
                    fill_normal(module.weight, std * (2 * depth) ** -0.5, generator)


def _real_patches(images: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Patches (P, 3, p, p) of images (I, 3, H, W) all of whose pixels are real by `mask`, and their grid per image.

    Raises:
        DataError: images smaller than a patch, or the real patches of one are not a rectangle at its top left.
    """
    rows, columns = images.shape[2] // size, images.shape[3] // size
    if not rows or not columns:
        raise DataError(
            f"pixel_values are {images.shape[2]} x {images.shape[3]} pixels, but a patch of the vision tower takes "
            f"{size} x {size}: use the image processor of this model"
        )
    patches = cut_patches(images, size)
    if mask is None:
        return patches, [(rows, columns)] * images.shape[0]
    whole = mask.unfold(1, size, size).unfold(2, size, size).flatten(3).all(-1)
    shapes = list(zip(whole[:, :, 0].sum(1).tolist(), whole[:, 0].sum(1).tolist()))
    for i, (image_rows, image_columns) in enumerate(shapes):
        rectangle = whole[i, :image_rows, :image_columns]
        if not image_rows or not image_columns or not rectangle.all() or whole[i].sum() != rectangle.numel():
            raise DataError(
                f"pixel_attention_mask of image {i} marks no rectangle of whole {size} x {size} patches at its top left: use "
                "the mask of the image processor"
            )
    return patches[whole.flatten()], shapes


class Idefics2ForConditionalGeneration(MultimodalLM):
    """See `MultimodalLM`."""

    config_class: ClassVar[type[PretrainedConfig]] = Idefics2Config
    model_class: ClassVar[type[MultimodalModel]] = Idefics2Model

    def image_flops(self, images: PackedImages) -> tuple[float, float]:
        assert images.patches is not None
        vision, text, lengths = self.config.vision_config, self.config.text_config, images.patches.lengths
        projection = text.intermediate_size * (2 * vision.hidden_size + text.hidden_size)
        perceiver = perceiver_flops(self.config.perceiver_config, lengths)
        return vision_flops(vision, lengths), 2.0 * sum(lengths) * projection + perceiver
