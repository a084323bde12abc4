"""Tiny models with weights that hide no error, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedImages, Segments

IMAGE_TOKEN = 90

# Changes that leave a tiny model two layers of text and one of everything else: enough where cost grows with depth, and
# the matter does not.
SHALLOW: dict[str, dict[str, Any]] = {
    "idefics": {
        "num_hidden_layers": 2,
        "vision_config": {"num_hidden_layers": 1},
        "perceiver_config": {"resampler_depth": 1},
    },
    "idefics2": {
        "vision_config": {"num_hidden_layers": 1},
        "text_config": {"num_hidden_layers": 2},
        "perceiver_config": {"resampler_depth": 1},
    },
    "idefics3": {"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 2}},
}


def tiny_idefics3(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Idefics3; keys of `vision_config` and `text_config` are merged."""
    config: dict[str, Any] = {
        "model_type": "idefics3",
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "idefics3",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 16,
            "patch_size": 4,
            "hidden_act": "gelu_pytorch_tanh",
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }
    return _changed(config, changes)


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0, matrices: float = 0.15, vectors: float = 0.1) -> None:
    """Moves every parameter off its initial value, so that zero gates, unit norms and equal rows hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() > 1 or name.endswith("class_embedding"):
            parameter.copy_(noise * matrices)
        else:
            parameter.add_(noise * vectors)


def packed_batch(
    documents: list[Tensor],
    frames: Tensor | None = None,
    count: int = 0,
    image_token: int = IMAGE_TOKEN,
    pixel_table: Tensor | None = None,
    weights: Tensor | None = None,
) -> PackedBatch:
    """Packs `documents`; every token but the first of a document and image tokens is a target."""
    ids = torch.cat(documents)
    starts, positions, targets = 0, [], []
    for document in documents:
        for i in range(len(document) - 1):
            if document[i + 1] != image_token:
                positions.append(starts + i)
                targets.append(int(document[i + 1]))
        starts += len(document)
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(len(d)) for d in documents]),
        segments=Segments.of([len(d) for d in documents]),
        loss_positions=torch.tensor(positions, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        images=None if frames is None else PackedImages(frames, count, pixel_table),
        image_positions=torch.nonzero(ids == image_token)[:, 0],
        target_weights=weights,
    )


def document(generator: torch.Generator, length: int, frames: int = 0, tokens_per_frame: int = 4) -> Tensor:
    """Random ids with `frames` runs of image tokens inside."""
    ids = torch.randint(3, 80, (length,), generator=generator)
    runs = [torch.full((tokens_per_frame,), IMAGE_TOKEN)] * frames
    pieces = ids.tensor_split(frames + 1)
    return torch.cat([p for pair in zip(pieces, [*runs, ids[:0]]) for p in pair])


def tiny_idefics2(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Idefics2, with 6 latents and a table of 7 x 7 positions."""
    config: dict[str, Any] = {
        "model_type": "idefics2",
        "image_token_id": IMAGE_TOKEN,
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 28,
            "patch_size": 4,
        },
        "perceiver_config": {
            "hidden_size": 32,
            "rms_norm_eps": 1e-6,
            "resampler_n_latents": 6,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }
    return _changed(config, changes)


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if merge else value
    return config


def tiny_idefics(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Idefics with resampler, query-key norms, two additional ids and gates that are open."""
    config: dict[str, Any] = {
        "model_type": "idefics",
        "vocab_size": 97,
        "additional_vocab_size": 2,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "use_resampler": True,
        "alpha_initializer": "ones",
        "alpha_type": "float",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "vision_config": {
            "embed_dim": 24,
            "image_size": 16,
            "patch_size": 4,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "hidden_act": "gelu",
        },
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 3,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
    }
    return _changed(config, changes)
