"""The shapes of the published models, so that an estimate needs no download. Only what memory and time depend on is here:
sources are the config.json files of the hub, and the papers where these leave a value out."""

from __future__ import annotations

from typing import Any


def _siglip_so400m(side: int) -> dict[str, Any]:
    return {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": side,
        "patch_size": 14,
    }


def _smolvlm(hidden: int, inner: int, layers: int, heads: int, kv: int, **own: Any) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": own.pop("rows", 49280),
        "max_position_embeddings": own.pop("positions", 8192),
    }
    base = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    plain = {"scale_factor": 4, "image_token_id": 49190, "tie_word_embeddings": False, "vision_config": base}
    return {**plain, **own, "text_config": text}


def _idefics(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 32000,
        "additional_vocab_size": 2,
        "cross_layer_interval": 4,
        "use_resampler": True,
        "qk_layer_norms": True,
        "vision_config": {
            "embed_dim": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
        "perceiver_config": {"use_resampler": True, "resampler_depth": 6, "qk_layer_norms_perceiver": True},
    }


def _decoder_8b(rows: int, positions: int) -> dict[str, Any]:
    """Mistral 7B and Llama 8B, which have the same widths and depth."""
    return {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": rows,
        "max_position_embeddings": positions,
    }


_IDEFICS2 = {
    "image_token_id": 32001,
    "vision_config": _siglip_so400m(980),
    "text_config": _decoder_8b(32003, 32768),
}
_IDEFICS3 = {
    "image_token_id": 128257,
    "scale_factor": 2,
    "vision_config": _siglip_so400m(364),
    "text_config": _decoder_8b(128259, 131072),
}
_2B = {"rows": 49155, "positions": 16384, "scale_factor": 3, "image_token_id": 49153}
_9B, _80B = _idefics(4096, 11008, 32, 32), _idefics(8192, 22016, 80, 64)
_SMALL, _MIDDLE = _smolvlm(576, 1536, 30, 9, 3), _smolvlm(960, 2560, 32, 15, 5)
_LARGE = _smolvlm(2048, 8192, 24, 32, 32, **_2B, vision_config=_siglip_so400m(384))

# Hub id -> keys of config.json. All of these files store bf16.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "HuggingFaceM4/idefics-9b": _9B,
    "HuggingFaceM4/idefics-9b-instruct": _9B,
    "HuggingFaceM4/idefics-80b": _80B,
    "HuggingFaceM4/idefics-80b-instruct": _80B,
    "HuggingFaceM4/idefics2-8b-base": _IDEFICS2,
    "HuggingFaceM4/idefics2-8b": _IDEFICS2,
    "HuggingFaceM4/idefics2-8b-chatty": _IDEFICS2,
    "HuggingFaceM4/Idefics3-8B-Llama3": _IDEFICS3,
    "HuggingFaceTB/SmolVLM-256M-Base": _SMALL,
    "HuggingFaceTB/SmolVLM-256M-Instruct": _SMALL,
    "HuggingFaceTB/SmolVLM-500M-Base": _MIDDLE,
    "HuggingFaceTB/SmolVLM-500M-Instruct": _MIDDLE,
    "HuggingFaceTB/SmolVLM-Base": _LARGE,
    "HuggingFaceTB/SmolVLM-Instruct": _LARGE,
}


def _clip(**tower: int) -> dict[str, Any]:
    return {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model", **tower}}


def _siglip(**tower: int) -> dict[str, Any]:
    return {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model", **tower}}


def _text(
    hidden: int, inner: int, layers: int, heads: int, kv: int, rows: int, positions: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": rows,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


# Hub id -> keys of config.json of the towers that new models are made of.
BACKBONES: dict[str, dict[str, Any]] = {
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(**_9B["vision_config"], hidden_size=1280),
    "google/siglip-so400m-patch14-384": _siglip(**_siglip_so400m(384)),
    "google/siglip-base-patch16-512": _siglip(**_SMALL["vision_config"]),
    "huggyllama/llama-7b": _text(4096, 11008, 32, 32, 32, 32000, 2048, False),
    "huggyllama/llama-65b": _text(8192, 22016, 80, 64, 64, 32000, 2048, False),
    "mistralai/Mistral-7B-v0.1": _text(4096, 14336, 32, 32, 8, 32000, 32768, False),
    "meta-llama/Llama-3.1-8B-Instruct": _text(4096, 14336, 32, 32, 8, 128256, 131072, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _text(576, 1536, 30, 9, 3, 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _text(960, 2560, 32, 15, 5, 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _text(2048, 8192, 24, 32, 32, 49152, 8192, True),
}
