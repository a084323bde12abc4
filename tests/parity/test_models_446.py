"""Against stored results of transformers 4.46.3, made by make_fixtures_446.py."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

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
from tests.helpers.rounding import assert_near
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs, labels_with_padding
from tests.parity.models_reference import rounding

FOLDER = Path(__file__).parent / "fixtures" / "models_446"
FAMILIES: dict[str, tuple[Any, Any, Any, Any]] = {
    "idefics": (IdeficsForVisionText2Text, IdeficsConfig, tiny_idefics, idefics_inputs),
    "idefics2": (Idefics2ForConditionalGeneration, Idefics2Config, tiny_idefics2, idefics2_inputs),
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config, tiny_idefics3, idefics3_inputs),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss(family: str) -> None:
    """The loss of that release leaves out labels the attention mask hides, and it can count additional ids."""
    model, (_, _, tiny, build) = ours(family, False), FAMILIES[family]
    inputs = build(tiny())
    expected = load_file(FOLDER / f"{family}.safetensors")
    real = inputs["attention_mask"].bool()
    output = model(**inputs, labels=labels_with_padding(inputs).masked_fill(~real, -100))
    error = rounding(model, inputs)
    assert_near(output.logits[real], expected["logits"][real], error)
    assert_near(output.loss, expected["loss"], error)


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


_LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
for line in sys.stdin:
    folder, kind = line.split()
    model, found = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    inputs = load_file(folder + "/inputs.safetensors")
    with torch.no_grad():
        save_file({"logits": model.eval()(**inputs).logits.contiguous()}, folder + "/logits.safetensors")
    keys = {name: list(found[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    with open(folder + "/found.json", "w") as file:
        json.dump(keys, file)
"""
CASES = list(itertools.product(FAMILIES, (False, True), (5_000_000_000, 20_000)))


def ours(family: str, tied: bool) -> Any:
    model_class, config_class, tiny, _ = FAMILIES[family]
    model = model_class(config_class.from_dict(tiny(tie_word_embeddings=tied)))
    perturb(model)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """A folder of ours for each case, and what that release found in it; one process of it reads them all."""
    folders = {case: tmp_path_factory.mktemp("folder") for case in CASES}
    for (family, tied, shard_bytes), folder in folders.items():
        ours(family, tied).save_pretrained(folder, max_shard_bytes=shard_bytes)
        _, _, tiny, build = FAMILIES[family]
        save_file(build(tiny()), folder / "inputs.safetensors")
    lines = [f"{folder} {FAMILIES[family][0].__name__}" for (family, *_), folder in folders.items()]
    command = [os.environ["PYTHON_TRANSFORMERS_446"], "-c", _LOAD]
    subprocess.run(command, input="\n".join(lines), check=True, capture_output=True, text=True)
    return folders


@pytest.mark.skipif("PYTHON_TRANSFORMERS_446" not in os.environ, reason="needs an interpreter with transformers 4.46.3")
@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied", "shard_bytes"), CASES)
def test_446_loads_our_folders(family: str, tied: bool, shard_bytes: int, folders: dict[Any, Path]) -> None:
    folder, inputs = folders[family, tied, shard_bytes], FAMILIES[family][3](FAMILIES[family][2]())
    assert len(list(folder.glob("model*.safetensors"))) > 1 or shard_bytes > 20_000
    found = json.loads((folder / "found.json").read_text())
    assert found == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    model, real = ours(family, tied), inputs["attention_mask"].bool()
    logits = load_file(folder / "logits.safetensors")["logits"]
    assert_near(model(**inputs).logits[real], logits[real], rounding(model, inputs))
