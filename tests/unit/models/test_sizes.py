"""Published models have the published numbers of parameters, counted on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m4train.models import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)

CLIP_H = {"embed_dim": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
IDEFICS = {
    "cross_layer_interval": 4,
    "additional_vocab_size": 2,
    "qk_layer_norms": True,
    "use_resampler": True,
    "vision_config": CLIP_H,
    "perceiver_config": {"qk_layer_norms_perceiver": True},
}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
BASE_16 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


def frames(tower: dict[str, Any], size: int, patch: int) -> dict[str, Any]:
    return {**tower, "image_size": size, "patch_size": patch}


MODELS: dict[str, tuple[Any, Any, dict[str, Any], float, dict[str, float]]] = {
    "idefics-9b": (
        IdeficsForVisionText2Text,
        IdeficsConfig,
        IDEFICS,
        8.93,
        {"text": 6.48, "vision": 0.63, "connector": 0.126, "cross_attention": 1.43},
    ),
    "idefics-80b": (
        IdeficsForVisionText2Text,
        IdeficsConfig,
        {
            **IDEFICS,
            "hidden_size": 8192,
            "intermediate_size": 22016,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "rms_norm_eps": 1e-5,
        },
        79.97,
        {"text": 64.8, "vision": 0.63, "connector": 0.126, "cross_attention": 13.9},
    ),
    "idefics2-8b": (
        Idefics2ForConditionalGeneration,
        Idefics2Config,
        {"vision_config": frames(SO400M, 980, 14), "text_config": {"vocab_size": 32003}},
        8.40,
        {"vision": 0.418, "connector": 0.743, "lm_head": 0.131},
    ),
    "idefics3-8b": (
        Idefics3ForConditionalGeneration,
        Idefics3Config,
        {"vision_config": frames(SO400M, 364, 14), "text_config": text(4096, 14336, 32, 32, 8, 128259)},
        8.46,
        {"vision": 0.413, "connector": 0.019, "lm_head": 0.525},
    ),
    "smolvlm-2.2b": (
        Idefics3ForConditionalGeneration,
        Idefics3Config,
        {
            "scale_factor": 3,
            "vision_config": frames(SO400M, 384, 14),
            "text_config": text(2048, 8192, 24, 32, 32, 49155),
        },
        2.246,
        {},
    ),
    "smolvlm-500m": (
        Idefics3ForConditionalGeneration,
        Idefics3Config,
        {
            "scale_factor": 4,
            "vision_config": frames(BASE_16, 512, 16),
            "text_config": text(960, 2560, 32, 15, 5, 49280),
        },
        0.507,
        {},
    ),
    "smolvlm-256m": (
        Idefics3ForConditionalGeneration,
        Idefics3Config,
        {
            "scale_factor": 4,
            "vision_config": frames(BASE_16, 512, 16),
            "text_config": text(576, 1536, 30, 9, 3, 49280),
        },
        0.256,
        {},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters(name: str) -> None:
    """In thousand millions, to the last digit published."""
    model_class, config_class, values, published, parts = MODELS[name]
    with torch.device("meta"):
        model = model_class(config_class.from_dict(values))
    sizes = {parameter_name: p.numel() / 1e9 for parameter_name, p in model.named_parameters()}
    digits = len(str(published).split(".")[1])
    assert abs(sum(sizes.values()) - published) < 0.6 * 10**-digits
    for part, expected in parts.items():
        found = sum(size for key, size in sizes.items() if key.startswith(model.parts()[part]))
        assert abs(found - expected) < 0.012 * expected, part
