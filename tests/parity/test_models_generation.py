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
from tests.helpers.models import IMAGE_TOKEN, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs
from tests.parity.models_reference import reference_pair

FAMILIES: dict[str, tuple[str, type, Any, Any]] = {
    "idefics": ("Idefics", IdeficsForVisionText2Text, tiny_idefics, idefics_inputs),
    "idefics2": ("Idefics2", Idefics2ForConditionalGeneration, tiny_idefics2, idefics2_inputs),
    "idefics3": ("Idefics3", Idefics3ForConditionalGeneration, tiny_idefics3, idefics3_inputs),
}
BAD_WORDS = [[11], [5, 6], [40], [2]]
NO_IMAGES = [[IMAGE_TOKEN]]  # the reference, too, wants an image for a token computed without cache

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
    "greedy_penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_new_tokens": 30},
    "greedy_no_repeats": {"no_repeat_ngram_size": 1},
    "greedy_at_least": {"min_new_tokens": 6, "eos_token_id": list(range(2, 60))},
    "greedy_min_length": {"min_length": 24, "eos_token_id": list(range(2, 60))},
    "greedy_no_cache": {"use_cache": False, "bad_words_ids": NO_IMAGES},
    "beams_penalties": {"num_beams": 3, "repetition_penalty": 0.7, "no_repeat_ngram_size": 3, "max_new_tokens": 20},
    "beams_at_least": {"num_beams": 3, "min_new_tokens": 5, "eos_token_id": list(range(2, 60))},
    "beams_no_cache": {"num_beams": 3, "use_cache": False, "bad_words_ids": NO_IMAGES},
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stated", [True, False])
def test_ends_of_the_configuration(family: str, stated: bool, tmp_path: Path) -> None:
    """With and without the generation_config.json that says the same."""
    kind, ours_class, tiny, _ = FAMILIES[family]
    prompt, images = torch.tensor([[5, 6, 7, 8]]), {}
    if family == "idefics":  # the reference cannot do without
        images = {"pixel_values": torch.zeros(1, 1, 3, 16, 16), "image_attention_mask": torch.zeros(1, 4, 1)}
    _, free = reference_pair(kind, tiny(), ours_class, tmp_path / "free")
    stop = free.generate(prompt, max_new_tokens=8, eos_token_id=[])[0, 6].item()
    ends = {"eos_token_id": stop} if family == "idefics" else {"text_config": {"eos_token_id": stop}}
    theirs, ours = reference_pair(kind, tiny(**ends), ours_class, tmp_path)
    if not stated:
        (tmp_path / "generation_config.json").unlink()
        theirs, ours = type(theirs).from_pretrained(tmp_path), ours_class.from_pretrained(tmp_path)
    expected = theirs.generate(prompt, **images, max_new_tokens=8, do_sample=False).tolist()
    assert len(expected[0]) < 12
    assert ours.generate(prompt, max_new_tokens=8).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_prompts_without_a_mask(family: str, tmp_path: Path) -> None:
    kind, ours_class, tiny, _ = FAMILIES[family]
    theirs, ours = reference_pair(kind, tiny(), ours_class, tmp_path)
    prompts = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    inputs = {}
    if family == "idefics":  # the reference cannot do without images
        inputs = {"pixel_values": torch.zeros(2, 1, 3, 16, 16), "image_attention_mask": torch.zeros(2, 4, 1)}
    found = []
    for special in ({"pad_token_id": 0, "eos_token_id": [2]}, {"pad_token_id": 0, "eos_token_id": [2, 0]}, {}):
        expected = theirs.generate(prompts, **inputs, max_new_tokens=6, do_sample=False, **special).tolist()
        assert ours.generate(prompts, **inputs, max_new_tokens=6, **special).tolist() == expected
        found.append(expected)
    assert found[0] != found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_and_arrays_in_place_of_tensors(family: str, tmp_path: Path) -> None:
    kind, ours_class, tiny, padded_inputs = FAMILIES[family]
    _, ours = reference_pair(kind, tiny(), ours_class, tmp_path)
    inputs = padded_inputs(tiny(), "left")
    expected = ours.generate(**inputs, max_new_tokens=4).tolist()
    lists = {name: t.tolist() for name, t in inputs.items()} | {"pixel_values": inputs["pixel_values"].numpy()}
    lists["attention_mask"] = [row.numpy() for row in inputs["attention_mask"]]
    assert ours.generate(**lists, max_new_tokens=4).tolist() == expected
    labels = inputs["input_ids"]
    actual, wanted = ours(**lists, labels=labels.tolist()), ours(**inputs, labels=labels)
    assert torch.equal(actual.logits, wanted.logits)
    assert torch.equal(actual.loss, wanted.loss)


def test_what_can_be_drawn() -> None:
    """The filters keep the same tokens with the same probabilities as the reference's."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from m4train.models.generation_settings import GenerationSettings
    from m4train.models.sampling import kept

    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_k, top_p in ((0.7, 5, 0.9), (1.5, 0, 0.3), (1.0, 50, 0.999), (2.0, 200, 1.0)):
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        settings = GenerationSettings(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        torch.testing.assert_close(kept(logits, settings).softmax(-1), expected.softmax(-1))
