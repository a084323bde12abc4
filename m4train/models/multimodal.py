"""What Idefics2, Idefics3 and SmolVLM share: image features take the places of image tokens, and a decoder reads on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedImages, PackedOutput
from m4train.errors import DataError
from m4train.models.contexts import PackedContext
from m4train.models.decoder import Decoder, decoder_flops
from m4train.models.doors import LMDoors, ModelDoors
from m4train.models.generation import GenerationMixin
from m4train.models.initialisation import fill_normal
from m4train.models.loss import LMHead, token_loss
from m4train.models.padded import PaddedTokens, check_image_counts
from m4train.models.pretrained import PretrainedModel


class MultimodalModel(ModelDoors, PretrainedModel):
    """A vision tower, a connector and a decoder, without head.

    `forward` takes a `PackedBatch` and returns hidden states (T, H); or the documented padded arguments.
    """

    checkpoint_prefix = "model."
    vision_model: Any
    connector: Any
    text_model: Decoder

    def image_features(self, images: PackedImages) -> Tensor:
        """Features (images x tokens per image, H) of all images, in one call of the tower."""
        raise NotImplementedError

    def pack_images(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[PackedImages, Tensor]:
        """The images of (B, N, 3, H, W) that are not padding, packed; and how many each sample has (B,)."""
        raise NotImplementedError

    def forward_packed(self, batch: PackedBatch) -> Tensor:
        hidden = self.text_model.embed_tokens(batch.input_ids)
        if batch.images is not None:
            hidden = self._merge(hidden, batch.images, batch.image_positions)
        tables = self.text_model.rotary.tables(batch.position_ids)
        return self.text_model(hidden, PackedContext(tables, batch.segments, self.config.text_config.window))

    def _merge(self, hidden: Tensor, images: PackedImages, positions: Tensor | None) -> Tensor:
        """Puts the image features at their places; those beyond `images.count` go nowhere, with zero gradient."""
        per_image = self.config.tokens_per_image
        if positions is None:
            positions = torch.empty(0, dtype=torch.int64, device=hidden.device)
        if positions.shape[0] != images.count * per_image:
            raise DataError(
                f"the batch has {positions.shape[0]} image positions, but its {images.count} images give "
                f"{images.count * per_image} ({per_image} each): rebuild the batch with the processor of this model"
            )
        features = self.image_features(images)[: images.count * per_image]
        return hidden.index_copy(0, positions, features.to(hidden.dtype))

    def get_image_features(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None) -> Tensor:
        """Features (images, tokens, H) of the images of (B, N, 3, H, W) that are not all zero, in reading order."""
        images, _ = self.pack_images(pixel_values, pixel_attention_mask)
        return self.image_features(images).unflatten(0, (-1, self.config.tokens_per_image))[: images.count]

    def embed_padded(
        self, flat: Tensor, is_image: Tensor, tokens: PaddedTokens, image_inputs: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Merges images into flat embeddings; `is_image` (tokens,) marks their places. Also gives the features used."""
        per_image = self.config.tokens_per_image
        pixel_values, given = image_inputs.get("pixel_values"), image_inputs.get("image_hidden_states")
        if pixel_values is not None and given is not None:
            raise DataError("both pixel_values and image_hidden_states are given: pass one of them")
        if pixel_values is not None:
            images, counts = self.pack_images(pixel_values, image_inputs.get("pixel_attention_mask"))
            found = torch.zeros_like(counts).index_add(0, tokens.rows, is_image.long())
            check_image_counts(found, counts * per_image, per_image)
            features = self.image_features(images)[: images.count * per_image]
        elif given is not None:
            features = given.flatten(0, -2)
            check_image_counts(is_image.sum()[None], torch.tensor([features.shape[0]], device=flat.device), 1)
        else:
            return flat, None
        positions = torch.nonzero(is_image)[:, 0]
        merged = flat.index_copy(0, positions, features.to(flat.dtype))
        return merged, features.unflatten(0, (-1, per_image))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        raise NotImplementedError


class MultimodalLM(LMDoors, GenerationMixin, PretrainedModel):
    """A `MultimodalModel` with its language-model head.

    `forward` takes a `PackedBatch` (training) and returns a `PackedOutput`; or the documented padded arguments.
    """

    model_class: ClassVar[type[MultimodalModel]]

    def __init__(self, config: Any) -> None:
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

    def image_flops(self, images: PackedImages) -> tuple[float, float]:
        """Forward FLOPs of the tower and of the connector."""
        raise NotImplementedError

    def flops(self, batch: PackedBatch) -> dict[str, float]:
        """Forward FLOPs of `batch` per part, by segment length; a multiply-add counts two, other operations none."""
        text = self.config.text_config
        vision, connector = (0.0, 0.0) if batch.images is None else self.image_flops(batch.images)
        return {
            "vision": vision,
            "connector": connector,
            "embeddings": 0.0,
            "text": decoder_flops(text, batch.segments.lengths),
            "lm_head": 2.0 * batch.loss_tokens * text.hidden_size * text.vocab_size,
        }

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch; see the `init_weights` of the model without head."""
        self.model.init_weights(generator)
        fill_normal(self.lm_head.weight, self.config.initializer_range, generator)
