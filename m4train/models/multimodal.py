"""What Idefics2, Idefics3 and SmolVLM share: image features take the places of image tokens, and a decoder reads on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedImages, PackedOutput
from m4train.errors import DataError
from m4train.models.arguments import OUTPUTS
from m4train.models.attention import attention_kernels
from m4train.models.contexts import PackedContext
from m4train.models.decoder import Decoder, decoder_flops
from m4train.models.doors import LMDoors, ModelDoors, PaddedInputs
from m4train.models.generation import GenerationMixin
from m4train.models.initialisation import fill_normal
from m4train.models.layers import Rotary
from m4train.models.loss import LMHead, token_loss
from m4train.models.padded import check_image_counts, real_images
from m4train.models.pretrained import PretrainedModel
from m4train.models.token_rows import grow_rows, has_own_rows, joined_rows, split_rows
from m4train.parts import CONNECTOR, EMBEDDINGS, LM_HEAD, NEW_TOKENS, TEXT, VISION


class MultimodalModel(ModelDoors, PretrainedModel):
    """A vision tower, a connector and a decoder, without head.

    `forward` takes a `PackedBatch` and returns hidden states (T, H); or the documented padded arguments, among them
    `pixel_values` (B, N, 3, H, W), all-zero images being padding, `pixel_attention_mask` (B, N, H, W), and in their place
    `image_hidden_states` (images, tokens, H).
    """

    checkpoint_prefix = "model."
    embedding_name: ClassVar[str] = "text_model.embed_tokens"
    image_arguments = ("pixel_values", "pixel_attention_mask", "image_hidden_states")
    documented_order: ClassVar[tuple[str, ...]] = (*image_arguments, *OUTPUTS, "return_dict")
    vision_model: Any
    connector: Any
    text_model: Decoder

    @property
    def rotary(self) -> Rotary:
        return self.text_model.rotary

    @property
    def image_token_id(self) -> int:
        """The id whose places images take, of the configuration."""
        return self.config.image_token_id

    @image_token_id.setter
    def image_token_id(self, value: int) -> None:
        self.config.image_token_id = value

    def image_features(self, images: PackedImages) -> Tensor:
        """Features (images x tokens per image, H) of all images, in one call of the tower."""
        raise NotImplementedError

    def pack(self, images: Tensor, mask: Tensor | None) -> PackedImages:
        """Images (I, 3, H, W) as `image_features` takes them; `mask` (I, H, W) bool is True where a pixel is real."""
        raise NotImplementedError

    def pack_images(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[PackedImages, Tensor]:
        """The images of (B, N, 3, H, W) that are not padding, packed; and how many each sample has (B,)."""
        real = real_images(pixel_values)
        if (
            pixel_mask is not None
        ):  # a black image is all zero without normalisation, but its mask says that it is there
            real = real | pixel_mask.flatten(2).any(-1)
        counts = real.sum(1)
        count = int(counts.sum())
        if count == 0:
            # The tower still runs, on a padding image that nobody uses, so that all ranks call it.
            return replace(self.pack(pixel_values[:1, 0], None), count=0), counts
        return self.pack(pixel_values[real], None if pixel_mask is None else pixel_mask[real].bool()), counts

    def forward_packed(self, batch: PackedBatch) -> Tensor:
        """Hidden states (T, H) after the last norm."""
        hidden = self.text_model.embed_tokens(batch.input_ids)
        if batch.images is not None:
            hidden = self._merge(hidden, batch.images, batch.image_positions)
        tables = self.rotary.tables(batch.position_ids)
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

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (...,) -> embeddings (..., H)."""
        return self.text_model.embed_tokens(input_ids)

    def run_padded(self, inputs: PaddedInputs) -> tuple[Tensor, Tensor | None]:
        """Hidden states (tokens, H), and the image features that were used (images, tokens per image, H)."""
        hidden, features = inputs.hidden, self._padded_features(inputs)
        if features is not None:
            positions = torch.nonzero(self._is_image(inputs))[:, 0]
            hidden = hidden.index_copy(0, positions, features.to(hidden.dtype))
            features = features.unflatten(0, (-1, self.config.tokens_per_image))
        return self.text_model(hidden, inputs.context, inputs.record), features

    def _is_image(self, inputs: PaddedInputs) -> Tensor:
        """(tokens,) bool: which places are for images."""
        if inputs.ids is not None:
            return inputs.ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs.hidden.device)
        return (inputs.hidden == self.text_model.embed_tokens(token)).all(-1)

    def _padded_features(self, inputs: PaddedInputs) -> Tensor | None:
        """Features for all image tokens, after checking that each sample has as many as its images give."""
        per_image, tokens = self.config.tokens_per_image, inputs.tokens
        pixel_values, given = inputs.images.get("pixel_values"), inputs.images.get("image_hidden_states")
        if pixel_values is not None and given is not None:
            raise DataError("both pixel_values and image_hidden_states are given: pass one of them")
        if pixel_values is not None:
            images, counts = self.pack_images(pixel_values, inputs.images.get("pixel_attention_mask"))
            found = torch.zeros_like(counts).index_add(0, tokens.rows, self._is_image(inputs).long())
            check_image_counts(found, counts * per_image, per_image)
            return self.image_features(images)[: images.count * per_image]
        if given is not None:
            features = given.flatten(0, -2)
            found = self._is_image(inputs).sum()[None]
            check_image_counts(found, torch.full_like(found, features.shape[0]), 1)
            return features
        return None

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        raise NotImplementedError


class MultimodalLM(LMDoors, GenerationMixin, PretrainedModel):
    """A `MultimodalModel` with its language-model head.

    `forward` takes a `PackedBatch` (training) and returns a `PackedOutput`; or the documented padded arguments.
    """

    model_class: ClassVar[type[MultimodalModel]]
    documented_order: ClassVar[tuple[str, ...]] = (
        *MultimodalModel.image_arguments,
        "labels",
        *OUTPUTS,
        "return_dict",
        "cache_position",
        "logits_to_keep",
    )
    loss_kind = "auto"  # who computes the loss of a PackedBatch, see `token_loss`
    embedding_name: ClassVar[str] = "model.text_model.embed_tokens"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = LMHead(config.text_config.hidden_size, config.text_config.vocab_size)
        self.tie_weights()
        self.init_weights()

    def forward_packed(self, batch: PackedBatch, z_loss: float = 0.0, return_logits: bool = False) -> PackedOutput:
        """Loss over `batch.loss_positions` (L,); logits (T, V) only if `return_logits`."""
        hidden = self.model(batch)
        predicting = hidden.index_select(0, batch.loss_positions)
        loss, losses = token_loss(self.lm_head, predicting, batch.targets, batch.target_weights, z_loss, self.loss_kind)
        return PackedOutput(loss, losses, self.lm_head(hidden) if return_logits else None)

    def get_image_features(self, pixel_values: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """That of the model without head: (images, tokens, H)."""
        return self.model.get_image_features(pixel_values, *arguments, **named)

    def tied_names(self) -> dict[str, str]:
        """Parameters that are another one: name -> the name it is stored under."""
        if not self.config.tie_word_embeddings:
            return {}
        tied = {"lm_head.weight": f"{self.embedding_name}.weight"}
        if self._has_own_rows():
            tied["lm_head.additional_fc.weight"] = f"{self.embedding_name}.additional_embedding.weight"
        return tied

    def _has_own_rows(self) -> bool:
        return has_own_rows(self.get_submodule(self.embedding_name))

    def split_token_rows(self, first: int) -> None:
        """Gives the token ids from `first` on rows of their own, which are the part new_tokens; see `split_rows`."""
        split_rows(self, first)

    def grow_token_rows(self, first: int, count: int, alike: Mapping[int, Sequence[int]]) -> None:
        """Gives embeddings and head a row for each of `count` ids, those from `first` on new; see `grow_rows`."""
        grow_rows(self, first, count, alike)

    def hub_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name as a published folder holds them: tied ones once, split rows joined."""
        return joined_rows(self.config, {name: t for name, t in tensors.items() if name not in self.tied_names()})

    def backbone_parts(self) -> dict[str, tuple[str, ...]]:
        """The parts except what belongs to token ids."""
        return {
            VISION: ("model.vision_model.",),
            CONNECTOR: ("model.connector.",),
            TEXT: ("model.text_model.layers.", "model.text_model.norm."),
        }

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Part name -> prefixes of the names of its parameters; every parameter is in exactly one part (the longest prefix)."""
        parts = {**self.backbone_parts(), EMBEDDINGS: (f"{self.embedding_name}.",), LM_HEAD: ("lm_head.",)}
        if self._has_own_rows():
            parts[NEW_TOKENS] = (f"{self.embedding_name}.additional_embedding.", "lm_head.additional_fc.")
        if self.config.tie_word_embeddings:
            del parts[LM_HEAD]
        return parts

    def blocks(self) -> dict[str, list[nn.Module]]:
        """Part name -> the modules to shard and to checkpoint, in the order they run."""
        return {
            VISION: list(self.model.vision_model.encoder.layers),
            CONNECTOR: [self.model.connector],
            TEXT: list(self.model.text_model.layers),
        }

    def attention_kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[str, ...]]:
        """Part name -> the kernels its attention trains with on `device`, computed in `dtype`."""
        return attention_kernels(self.blocks(), device, dtype)

    def image_flops(self, images: PackedImages) -> tuple[float, float]:
        """Forward FLOPs of the tower and of the connector."""
        raise NotImplementedError

    def flops(self, batch: PackedBatch) -> dict[str, float]:
        """Forward FLOPs of `batch` per part, by segment length; a multiply-add counts two, other operations none."""
        text = self.config.text_config
        vision, connector = (0.0, 0.0) if batch.images is None else self.image_flops(batch.images)
        return {
            VISION: vision,
            CONNECTOR: connector,
            EMBEDDINGS: 0.0,
            TEXT: decoder_flops(text, batch.segments.lengths),
            LM_HEAD: 2.0 * batch.loss_tokens * text.hidden_size * text.vocab_size,
        }

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch; see the `init_weights` of the model without head."""
        self.model.init_weights(generator)
        if not self.config.tie_word_embeddings:
            fill_normal(self.lm_head.weight, self.config.initializer_range, generator)
