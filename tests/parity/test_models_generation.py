"""Greedy and beam search give the reference's tokens, for all models and ragged prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m4train.models import (
    Idefics2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    IdeficsForVisionText2Text,
)
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs
from tests.parity.models_reference import reference_pair

FAMILIES: dict[str, tuple[str, type, Any, Any]] = {
    "idefics": ("Idefics", IdeficsForVisionText2Text, tiny_idefics, idefics_inputs),
    "idefics2": ("Idefics2", Idefics2ForConditionalGeneration, tiny_idefics2, idefics2_inputs),
    "idefics3": ("Idefics3", Idefics3ForConditionalGeneration, tiny_idefics3, idefics3_inputs),
}
BAD_WORDS = [[11], [5, 6], [40], [2]]

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy_bad_words": {"bad_words_ids": BAD_WORDS},
    "beams": {"num_beams": 3},
    "beams_ends": {"num_beams": 4, "eos_token_id": list(range(2, 24)), "max_new_tokens": 8},
    "beams_early": {"num_beams": 3, "early_stopping": True, "eos_token_id": list(range(2, 30))},
    "beams_never": {
        "num_beams": 2,
        "early_stopping": "never",
        "eos_token_id": list(range(2, 40)),
        "length_penalty": 2.0,
    },
    "beams_short": {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": list(range(2, 40))},
    "beams_several": {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": list(range(2, 20))},
    "beams_bad_words": {"num_beams": 3, "bad_words_ids": BAD_WORDS, "eos_token_id": [2, 3, 4, 5]},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_same_tokens(family: str, name: str, tmp_path: Path) -> None:
    kind, ours_class, tiny, padded_inputs = FAMILIES[family]
    config = tiny()
    theirs, ours = reference_pair(kind, config, ours_class, tmp_path)
    inputs = padded_inputs(config, "left")
    # Not 0: the reference takes that for "none given" in beam search.
    settings = {"max_new_tokens": 12, "eos_token_id": [2], "pad_token_id": 1, **SETTINGS[name]}
    expected = theirs.generate(**inputs, do_sample=False, **settings)
    assert ours.generate(**inputs, **settings).tolist() == expected.tolist()


def test_what_can_be_drawn() -> None:
    """The filters keep the same tokens with the same probabilities as the reference's."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from m4train.models.generation import GenerationSettings
    from m4train.models.sampling import kept

    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_k, top_p in ((0.7, 5, 0.9), (1.5, 0, 0.3), (1.0, 50, 0.999), (2.0, 200, 1.0)):
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        settings = GenerationSettings(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        torch.testing.assert_close(kept(logits, settings).softmax(-1), expected.softmax(-1))
