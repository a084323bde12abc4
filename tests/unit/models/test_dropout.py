"""Dropout of attention weights and of what layers add: in training alone, within each segment, with its exact gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m4train.batch import PackedBatch, Segments
from m4train.errors import ConfigError
from m4train.models import Idefics2Config, Idefics3Config, IdeficsConfig
from m4train.models.attention import attention
from m4train.training.gradient_checkpointing import checkpoint_blocks
from tests.unit.models.test_packing import documents_of, make

# Every key that drops something: family, and what is set.
KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "idefics dropout": ("idefics", {"dropout": 0.3}),
    "idefics vision": ("idefics", {"vision_config": {"attention_dropout": 0.3}}),
    "idefics2 text": ("idefics2", {"text_config": {"attention_dropout": 0.3}}),
    "idefics2 vision": ("idefics2", {"vision_config": {"attention_dropout": 0.3}}),
    "idefics2 perceiver": ("idefics2", {"perceiver_config": {"attention_dropout": 0.3}}),
    "idefics3 text": ("idefics3", {"text_config": {"attention_dropout": 0.3}}),
    "idefics3 vision": ("idefics3", {"vision_config": {"attention_dropout": 0.3}}),
}


def seeded(model: Any, batch: PackedBatch, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model(batch).token_losses


@pytest.mark.parametrize("key", KEYS)
def test_acts_in_training_alone(key: str) -> None:
    family, changes = KEYS[key]
    plain, build, per_image = make(family)
    batch = build(documents_of([(12, 1), (7, 1)], per_image))
    model, _, _ = make(family, **changes)
    expected = plain.eval()(batch).token_losses
    assert seeded(plain.train(), batch).equal(expected)
    assert seeded(model.eval(), batch).equal(expected)
    first, second = seeded(model.train(), batch), seeded(model, batch, seed=1)
    assert not first.equal(expected)
    assert not first.equal(second)
    assert first.equal(seeded(model, batch))


@pytest.mark.parametrize(
    ("config", "changes", "name"),
    [
        (IdeficsConfig, {"dropout": 1.0}, "IdeficsConfig.dropout is 1.0"),
        (
            IdeficsConfig,
            {"vision_config": {"attention_dropout": -0.1}},
            "IdeficsVisionConfig.attention_dropout is -0.1",
        ),
        (Idefics2Config, {"perceiver_config": {"attention_dropout": 2}}, "PerceiverConfig.attention_dropout is 2"),
        (Idefics3Config, {"text_config": {"attention_dropout": 1.5}}, "LlamaConfig.attention_dropout is 1.5"),
    ],
)
def test_what_is_no_probability_is_refused(config: Any, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}, but must be at least 0 and below 1"):
        config.from_dict(changes)


LENGTHS = {"equal": (6, 6, 6), "short": (3, 9, 5), "long": (5, 40, 3)}  # one branch of the operator each


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_right_on_average(lengths: str, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = Segments.of(LENGTHS[lengths])
    query = torch.randn(segments.total, 4, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, segments.total, 2, 8, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    expected = attention(query, key, value, segments, segments, causal=causal)
    draws = torch.stack(
        [attention(query, key, value, segments, segments, causal=causal, dropout=0.2) for _ in range(400)]
    )
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 20 + 1e-9)  # in standard errors of the mean
    assert draws.std(0).max() > 0.1
    assert error.max() < 6


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_gradient_of_attention_is_that_of_its_draw(lengths: str) -> None:
    segments = Segments.of(LENGTHS[lengths])
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(segments.total, heads, 2, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (2, 1, 1)
    ]

    def drawn(*qkv: Tensor) -> Tensor:
        torch.manual_seed(0)
        return attention(*qkv, segments, segments, causal=True, dropout=0.3)

    torch.autograd.gradcheck(drawn, inputs, fast_mode=True)


@pytest.mark.parametrize("key", KEYS)
def test_the_gradient_of_a_model_is_that_of_its_draw_also_when_recomputed(key: str) -> None:
    family, changes = KEYS[key]
    model, build, per_image = make(family, **changes)
    batch = build(documents_of([(9, 1), (6, 1)], per_image))
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def loss() -> Tensor:
        torch.manual_seed(0)
        return model(batch).loss

    def slope() -> float:
        model.zero_grad()
        loss().backward()
        return sum(float((p.grad * direction[name]).sum()) for name, p in model.named_parameters())

    def moved(step: float) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += step * direction[name]
            value = float(loss())
            for name, parameter in model.named_parameters():
                parameter -= step * direction[name]
        return value

    expected = slope()
    assert abs((moved(1e-6) - moved(-1e-6)) / 2e-6 - expected) < 1e-5 * abs(expected)
    checkpoint_blocks(model.blocks())
    assert abs(slope() - expected) < 1e-9 * abs(expected)


@pytest.mark.parametrize("key", KEYS)
def test_documents_stay_apart(key: str) -> None:
    family, changes = KEYS[key]
    model, build, per_image = make(family, **changes)
    one, two = documents_of([(12, 1), (7, 1)], per_image)
    other = (two[0].flip(0), [2 * image for image in two[1]])
    first, second = (seeded(model, build([one, last])) for last in (two, other))
    own = int((one[0][1:] != 90).sum())
    assert first[:own].equal(second[:own])
    assert not first[own:].equal(second[own:])
