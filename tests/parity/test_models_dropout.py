"""Where the reference drops, ours does: every dropout is replaced by a factor, so that both libraries compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m4train.models import (
    Idefics2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    IdeficsForVisionText2Text,
)
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.helpers.rounding import assert_near
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs
from tests.parity.models_reference import reference_pair, rounding

CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "Idefics": (
        IdeficsForVisionText2Text,
        tiny_idefics,
        idefics_inputs,
        {"dropout": 0.2, "vision_config": {"attention_dropout": 0.4}},
    ),
    "Idefics2": (
        Idefics2ForConditionalGeneration,
        tiny_idefics2,
        idefics2_inputs,
        {
            "text_config": {"attention_dropout": 0.2},
            "vision_config": {"attention_dropout": 0.4},
            "perceiver_config": {"attention_dropout": 0.6},
        },
    ),
    "Idefics3": (
        Idefics3ForConditionalGeneration,
        tiny_idefics3,
        idefics3_inputs,
        {"text_config": {"attention_dropout": 0.2}, "vision_config": {"attention_dropout": 0.4}},
    ),
}


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout multiplies by 1 - p; that of attention weights multiplies what they mix, which is the same."""
    functional = torch.nn.functional
    attend = functional.scaled_dot_product_attention

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (1 - p) if training else x

    def scaled(*qkv: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
        return attend(*qkv, **options) * (1 - dropout_p)

    monkeypatch.setattr(functional, "dropout", dropout)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", scaled)


@pytest.mark.parametrize("kind", CASES)
def test_dropout_acts_at_the_same_places(kind: str, tmp_path: Path, factors: None) -> None:
    ours, tiny, inputs_of, changes = CASES[kind]
    config = tiny(**changes)
    theirs, model = reference_pair(kind, config, ours, tmp_path)
    theirs.set_attn_implementation("eager")
    inputs = inputs_of(config)
    real = inputs["attention_mask"].bool()
    plain = theirs(**inputs, use_cache=False).logits[real]
    expected = theirs.train()(**inputs, use_cache=False).logits[real]
    assert (expected - plain).abs().max() > 1e-2
    assert_near(model.train()(**inputs).logits[real], expected, rounding(theirs, {**inputs, "use_cache": False}))
