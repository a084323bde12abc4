"""Idefics3 and SmolVLM: SigLIP frames, pixel shuffle, a linear projection, a Llama decoder."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedImages, PackedOutput
from m4train.errors import ConfigError, DataError
from m4train.models.configuration import Idefics3Config, ModelConfig, SmolVLMConfig
from m4train.models.contexts import PackedContext
from m4train.models.decoder import Decoder, decoder_flops
from m4train.models.generation import GenerationMixin
from m4train.models.initialisation import fill_normal, init_modules
from m4train.models.loss import LMHead, token_loss
from m4train.models.padded import PaddedTokens, check_image_counts, real_images
from m4train.models.pretrained import PretrainedModel
from m4train.models.vision import (
    PatchAttention,
    VisionTower,
    cut_patches,
    masked_positions,
    normalise,
    uniform_segments,
    vision_flops,
)
from m4train.models.wrapper import PaddedForward, PaddedLMForward


class Projection(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Connector(nn.Module):
    """(F, g * g, Hv) patch features -> (F * (g / s)^2, H): s x s neighbours become one token."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        self.scale_factor = config.scale_factor
        size = config.vision_config.hidden_size * config.scale_factor**2
        self.modality_projection = Projection(size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.modality_projection(pixel_shuffle(features, self.scale_factor)).flatten(0, 1)


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """(F, g * g, C) -> (F, (g / s)^2, C * s^2); within a cell the order is top-left, top-right, bottom-left, bottom-right.

    Raises:
        ConfigError: `factor` does not divide the grid.
    """
    grid = math.isqrt(features.shape[1])
    if grid % factor:
        raise ConfigError(
            f"a frame has {grid} patches a side, which scale_factor {factor} does not divide: change image_size, patch_size "
            "or scale_factor"
        )
    side = grid // factor
    cells = features.unflatten(1, (side, factor, side, factor))  # (F, row, dy, column, dx, C)
    return cells.transpose(2, 3).flatten(3).flatten(1, 2)


class Idefics3Model(PaddedForward, PretrainedModel):
    """The model without its head.

    `forward` takes a `PackedBatch` and returns hidden states (T, H); or the documented padded arguments.
    """

    config_class: ClassVar[type[ModelConfig]] = Idefics3Config
    checkpoint_prefix = "model."

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__(config)
        self.vision_model = VisionTower(config.vision_config)
        self.connector = Connector(config)
        self.text_model = Decoder(config.text_config)
        self.init_weights()

    def forward_packed(self, batch: PackedBatch) -> Tensor:
        hidden = self.text_model.embed_tokens(batch.input_ids)
        if batch.images is not None:
            hidden = self._merge(hidden, batch.images, batch.image_positions)
        tables = self.text_model.rotary.tables(batch.position_ids)
        return self.text_model(hidden, PackedContext(tables, batch.segments, self.config.text_config.window))

    def _merge(self, hidden: Tensor, images: PackedImages, positions: Tensor | None) -> Tensor:
        """Puts the image features at their places; those beyond `images.count` go nowhere, with zero gradient."""
        found = 0 if positions is None else positions.shape[0]
        expected = images.count * self.config.tokens_per_frame
        if found != expected:
            raise DataError(
                f"the batch has {found} image positions, but its {images.count} frames give {expected} "
                f"({self.config.tokens_per_frame} each): rebuild the batch with the processor of this model"
            )
        features = self.frame_features(normalise(images.pixels, images.pixel_table), images.patch_mask)
        if positions is None:
            positions = torch.empty(0, dtype=torch.int64, device=hidden.device)
        return hidden.index_copy(0, positions, features[:expected].to(hidden.dtype))

    def frame_features(self, frames: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Normalised frames (F, 3, S, S) -> features (F * tokens_per_frame, H); one call of the tower for all.

        Args:
            patch_mask: (F, g * g) bool, True where a patch is real; None: all are.

        Raises:
            DataError: the frames do not have the size of the tower.
        """
        vision = self.config.vision_config
        if tuple(frames.shape[1:]) != (3, vision.image_size, vision.image_size):
            raise DataError(
                f"frames have shape {tuple(frames.shape[1:])}, but the vision tower takes (3, {vision.image_size}, "
                f"{vision.image_size}): use the image processor of this model"
            )
        count, patches = frames.shape[0], vision.grid**2
        if patch_mask is None:
            position_ids = torch.arange(patches, device=frames.device).repeat(count)
        else:
            position_ids = masked_positions(patch_mask.unflatten(1, (vision.grid, vision.grid)), vision.grid)
        attend = PatchAttention(uniform_segments(count, patches, frames.device), patch_mask)
        features = self.vision_model(cut_patches(frames, vision.patch_size), position_ids, attend)
        return self.connector(features.unflatten(0, (count, patches)))

    def get_image_features(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None) -> Tensor:
        """Features (F, tokens, H) of the images of (B, N, 3, H, W) that are not all zero, in reading order."""
        features, _ = self._padded_images(pixel_values, pixel_attention_mask)
        return features.unflatten(0, (-1, self.config.tokens_per_frame))

    def _padded_images(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Flat features of the real images, and how many each sample has."""
        real = real_images(pixel_values)
        # A batch of nothing but padding images still runs the tower, on one of them, so that every rank calls it.
        chosen = pixel_values[real] if real.any() else pixel_values[:1, 0]
        patch_mask = None
        if pixel_mask is not None and real.any():
            size = self.config.vision_config.patch_size
            mask = pixel_mask[real].bool()
            patch_mask = mask.unfold(1, size, size).unfold(2, size, size).flatten(3).any(-1).flatten(1)
        dtype = self.connector.modality_projection.proj.weight.dtype
        features = self.frame_features(chosen.to(dtype), patch_mask)
        counts = real.sum(1)
        return features[: int(counts.sum()) * self.config.tokens_per_frame], counts

    def embed_padded(
        self, flat: Tensor, is_image: Tensor, tokens: PaddedTokens, image_inputs: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Merges images into flat embeddings; `is_image` (tokens,) marks their places. Also gives the features used."""
        pixel_values, given = image_inputs.get("pixel_values"), image_inputs.get("image_hidden_states")
        if pixel_values is not None and given is not None:
            raise DataError("both pixel_values and image_hidden_states are given: pass one of them")
        if pixel_values is not None:
            features, counts = self._padded_images(pixel_values, image_inputs.get("pixel_attention_mask"))
            per_frame = self.config.tokens_per_frame
            found = torch.zeros_like(counts).index_add(0, tokens.rows, is_image.long())
            check_image_counts(found, counts * per_frame, per_frame)
        elif given is not None:
            features = given.flatten(0, -2)
            check_image_counts(is_image.sum()[None], torch.tensor([features.shape[0]], device=flat.device), 1)
        else:
            return flat, None
        positions = torch.nonzero(is_image)[:, 0]
        merged = flat.index_copy(0, positions, features.to(flat.dtype))
        return merged, features.unflatten(0, (-1, self.config.tokens_per_frame))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch: normal, biases 0, norms 1."""
        init_modules(self, self.config.initializer_range, generator)
        size = self.config.text_config.hidden_size
        fill_normal(self.text_model.embed_tokens.weight, size**-0.5, generator)
        fill_normal(self.connector.modality_projection.proj.weight, (0.4 / size) ** 0.5, generator)


class Idefics3ForConditionalGeneration(PaddedLMForward, GenerationMixin, PretrainedModel):
    """The model with its language-model head.

    `forward` takes a `PackedBatch` (training) and returns a `PackedOutput`; or the documented padded arguments.
    """

    config_class: ClassVar[type[ModelConfig]] = Idefics3Config
    model_class: ClassVar[type[Idefics3Model]] = Idefics3Model

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = LMHead(config.text_config.hidden_size, config.text_config.vocab_size)
        self.tie_weights()
        self.init_weights()

    def forward_packed(self, batch: PackedBatch, z_loss: float = 0.0, return_logits: bool = False) -> PackedOutput:
        hidden = self.model(batch)
        predicting = hidden.index_select(0, batch.loss_positions)
        loss, losses = token_loss(self.lm_head, predicting, batch.targets, batch.target_weights, z_loss)
        return PackedOutput(loss, losses, self.lm_head(hidden) if return_logits else None)

    def tied_names(self) -> dict[str, str]:
        """Parameters that are another one: name -> the name it is stored under."""
        tied = self.config.tie_word_embeddings
        return {"lm_head.weight": "model.text_model.embed_tokens.weight"} if tied else {}

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Part name -> prefixes of the names of its parameters; every parameter is in exactly one part."""
        parts = {
            "vision": ("model.vision_model.",),
            "connector": ("model.connector.",),
            "embeddings": ("model.text_model.embed_tokens.",),
            "text": ("model.text_model.layers.", "model.text_model.norm."),
            "lm_head": ("lm_head.",),
        }
        if self.config.tie_word_embeddings:
            del parts["lm_head"]
        return parts

    def blocks(self) -> dict[str, list[nn.Module]]:
        """Part name -> the modules to shard and to checkpoint, in the order they run."""
        return {
            "vision": list(self.model.vision_model.encoder.layers),
            "connector": [self.model.connector],
            "text": list(self.model.text_model.layers),
        }

    def flops(self, batch: PackedBatch) -> dict[str, float]:
        """Forward FLOPs of `batch` per part, by segment length; a multiply-add counts two, other operations none."""
        vision, text = self.config.vision_config, self.config.text_config
        frames = batch.images.pixels.shape[0] if batch.images is not None else 0
        projection = vision.hidden_size * self.config.scale_factor**2 * text.hidden_size
        return {
            "vision": vision_flops(vision, (vision.grid**2,) * frames),
            "connector": 2.0 * frames * self.config.tokens_per_frame * projection,
            "embeddings": 0.0,
            "text": decoder_flops(text, batch.segments.lengths),
            "lm_head": 2.0 * batch.loss_tokens * text.hidden_size * text.vocab_size,
        }

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch; see `Idefics3Model.init_weights`."""
        self.model.init_weights(generator)
        fill_normal(self.lm_head.weight, self.config.initializer_range, generator)


class SmolVLMModel(Idefics3Model):
    config_class = SmolVLMConfig


class SmolVLMForConditionalGeneration(Idefics3ForConditionalGeneration):
    config_class = SmolVLMConfig
    model_class = SmolVLMModel
