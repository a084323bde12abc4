"""A model loaded in 4 bits, as the documentation of Idefics2 does, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import m4train
from m4train.errors import CheckpointError, ConfigError
from m4train.models import Idefics2ForConditionalGeneration
from tests.helpers.models import tiny_idefics2
from tests.helpers.rounding import assert_near
from tests.parity.models_inputs import idefics2_inputs
from tests.parity.models_reference import reference_pair, rounding, transformers

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
# Wide enough for blocks of 64 values.
WIDE: dict[str, Any] = {
    "vision_config": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64},
    "text_config": {"hidden_size": 64, "intermediate_size": 64},
    "perceiver_config": {"hidden_size": 64},
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_same_logits_in_4_bits(quant_type: str, tmp_path: Path) -> None:
    config = tiny_idefics2(**WIDE)
    exact, _ = reference_pair("Idefics2", config, Idefics2ForConditionalGeneration, tmp_path)
    settings = NF4 | {"bnb_4bit_quant_type": quant_type}
    theirs = transformers.Idefics2ForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(**settings)
    ).eval()
    inputs = idefics2_inputs(config)
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits[real]
    assert (expected - exact(**inputs).logits[real]).abs().mean() > 0.05
    error = rounding(exact, inputs)  # the layers in 4 bits have no float64
    for given in (m4train.BitsAndBytesConfig(**settings), transformers.BitsAndBytesConfig(**settings), settings):
        ours = Idefics2ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=given)
        actual = ours(**inputs).logits[real]
        assert_near(actual, expected, error)
    with pytest.raises(CheckpointError, match="stores layers in 4 bits, which folders do not hold"):
        ours.save_pretrained(tmp_path / "saved")


def test_what_there_is_not() -> None:
    with pytest.raises(ConfigError, match="load_in_4bit false, but only 4 bits are implemented"):
        m4train.BitsAndBytesConfig()
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type is 'int4': choose fp4 or nf4"):
        m4train.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")
