"""Against stored results of transformers 4.46.3, made by make_fixtures_446.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m4train.models import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)
from m4train.positions import patch_position_ids
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs, labels_with_padding

FOLDER = Path(__file__).parent / "fixtures" / "models_446"
FAMILIES: dict[str, tuple[Any, Any, Any, Any]] = {
    "idefics": (IdeficsForVisionText2Text, IdeficsConfig, tiny_idefics, idefics_inputs),
    "idefics2": (Idefics2ForConditionalGeneration, Idefics2Config, tiny_idefics2, idefics2_inputs),
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config, tiny_idefics3, idefics3_inputs),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss(family: str) -> None:
    """The loss of that release leaves out labels the attention mask hides, and it can count additional ids."""
    model_class, config_class, tiny, build = FAMILIES[family]
    model = model_class(config_class.from_dict(tiny()))
    perturb(model)
    inputs = build(tiny())
    expected = load_file(FOLDER / f"{family}.safetensors")
    output = model.eval()(**inputs, labels=labels_with_padding(inputs))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected["logits"][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, expected["loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_configuration_files(family: str) -> None:
    """They say the same as the values they were made from, and hold no key that is unknown here."""
    _, config_class, tiny, _ = FAMILIES[family]
    values = json.loads((FOLDER / f"{family}.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = config_class.from_dict(values).to_dict()
    for key, value in config_class.from_dict(tiny()).to_dict().items():
        if isinstance(value, dict):
            differing = {k: v for k, v in value.items() if read[key].get(k) != v and k not in ("model_type", "extra")}
            assert differing.keys() <= {"torch_dtype", "bos_token_id", "eos_token_id"}, differing
        elif key != "pad_token_id":
            assert read[key] == value, key


def test_position_tables() -> None:
    for side, table in load_file(FOLDER / "positions.safetensors").items():
        for n in range(1, int(side) + 1):
            assert patch_position_ids(1, n, int(side), "4.46").tolist() == table[n - 1, :n].tolist(), (side, n)
