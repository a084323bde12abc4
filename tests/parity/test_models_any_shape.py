"""Random configurations of every model against transformers: nothing is right only for the shapes of the other tests."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4train.models import (
    Idefics2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    IdeficsForVisionText2Text,
)
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.helpers.rounding import assert_near
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs
from tests.parity.models_reference import reference_pair, rounding

any_shape = settings(max_examples=15)
sides = st.sampled_from(["left", "right"])


@st.composite
def decoders(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 6))
    return {
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": draw(st.sampled_from([kv_heads * group * head_dim, kv_heads * group * 4])),
        "intermediate_size": draw(st.integers(3, 60)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(97, 130)),
        "rope_theta": draw(st.sampled_from([10.0, 1e4, 5e5])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
    }


@st.composite
def towers(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.integers(1, 9)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "hidden_act": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu"])),
    }


@torch.no_grad()
def assert_same_logits(kind: str, config: dict[str, Any], ours: type, inputs: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        theirs, mine = reference_pair(kind, config, ours, Path(folder))
        real = inputs["attention_mask"].bool()
        expected = theirs(**inputs).logits[real]
        assert_near(mine(**inputs).logits[real], expected, rounding(theirs, inputs))


@pytest.mark.slow
@any_shape
@given(
    decoders(),
    towers(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([4, 7, 8]),
    st.booleans(),
    sides,
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=3),
)
def test_idefics3(
    text: dict[str, Any],
    vision: dict[str, Any],
    factor: int,
    cells: int,
    patch: int,
    tied: bool,
    side: str,
    shares: list[tuple[float, float]],
) -> None:
    spare = patch - 1 if patch == 7 else 0  # pixels beyond the last whole patch
    vision = {**vision, "image_size": factor * cells * patch + spare, "patch_size": patch}
    config = tiny_idefics3(scale_factor=factor, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    inputs = idefics3_inputs(config, side)
    mask, size = inputs["pixel_attention_mask"].zero_(), vision["image_size"]
    whole = size - spare  # a frame real only beyond its last whole patch has no patch
    for frame, (height, width) in zip(((0, 0), (0, 1), (1, 0)), shares):
        mask[frame][: 1 + round(height * (whole - 1)), : 1 + round(width * (whole - 1))] = 1
    assert_same_logits("Idefics3", config, Idefics3ForConditionalGeneration, inputs)


@pytest.mark.slow
@any_shape
@given(decoders(), towers(), st.integers(1, 7), st.integers(1, 3), st.sampled_from([None, 1, 4, 9]), sides)
def test_idefics2(
    text: dict[str, Any], vision: dict[str, Any], latents: int, depth: int, window: int | None, side: str
) -> None:
    perceiver = {
        "hidden_size": text["hidden_size"],
        "resampler_n_latents": latents,
        "resampler_depth": depth,
        "resampler_n_heads": text["num_attention_heads"],
        "resampler_head_dim": 6,
        "num_key_value_heads": text["num_key_value_heads"],
    }
    text = {**text, "sliding_window": window}
    config = tiny_idefics2(text_config=text, vision_config=vision, perceiver_config=perceiver)
    assert_same_logits("Idefics2", config, Idefics2ForConditionalGeneration, idefics2_inputs(config, side))


@pytest.mark.slow
@any_shape
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    towers(),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from(["float", "vector"]),
    sides,
)
def test_idefics(
    heads: int,
    half_head: int,
    vision: dict[str, Any],
    interval: int,
    norms: bool,
    resampler: bool,
    additional: int,
    alpha_type: str,
    side: str,
) -> None:
    vision["embed_dim"] = vision.pop("hidden_size")
    config = tiny_idefics(
        num_attention_heads=heads,
        hidden_size=2 * half_head * heads,
        num_hidden_layers=2,
        cross_layer_interval=interval,
        qk_layer_norms=norms,
        use_resampler=resampler,
        additional_vocab_size=additional,
        alpha_type=alpha_type,
        vision_config=vision,
        perceiver_config={"resampler_n_latents": 1 + additional, "qk_layer_norms_perceiver": norms},
    )
    assert_same_logits("Idefics", config, IdeficsForVisionText2Text, idefics_inputs(config, side))
