"""Makes tests/parity/fixtures/models_446/*.safetensors with transformers 4.46.3, whose losses and position table differ.

Run from the root of the repository, in an environment with that release: python -m tests.parity.make_fixtures_446
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs, labels_with_padding

FOLDER = Path(__file__).parent / "fixtures" / "models_446"


def fixture(name: str, model_class: Any, config_class: Any, config: dict[str, Any], inputs: dict[str, Tensor]) -> None:
    """Logits and loss with every token but images labelled, padding too, and the config.json of that release."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = model_class(config_class(**values)).eval()
    perturb(model)
    labels = labels_with_padding(inputs)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors = {"logits": output.logits.contiguous(), "loss": output.loss}
    save_file(tensors, FOLDER / f"{name}.safetensors")
    text = json.dumps(model.config.to_dict(), indent=1, sort_keys=True, default=str) + "\n"
    (FOLDER / f"{name}.json").write_text(text)


def position_table(side: int) -> Tensor:
    """(side, side): row n - 1 holds the buckets of n rows of patches, -1 behind them."""
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = transformers.models.idefics2.configuration_idefics2.Idefics2VisionConfig(
        hidden_size=1, image_size=2 * side, patch_size=2, num_attention_heads=1
    )
    tower = Idefics2VisionEmbeddings(config)
    table = torch.full((side, side), -1)
    with torch.no_grad():
        for parameter in tower.patch_embedding.parameters():
            parameter.zero_()
        tower.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        for n in range(1, side + 1):
            out = tower(torch.zeros(1, 3, 2, 2 * n), torch.ones(1, 1, n, dtype=torch.bool))
            table[n - 1, :n] = out.flatten().long()
    return table


def main() -> None:
    assert transformers.__version__ == "4.46.3", transformers.__version__
    t = transformers
    for name, model_class, config_class, config, build in (
        ("idefics", t.IdeficsForVisionText2Text, t.IdeficsConfig, tiny_idefics(), idefics_inputs),
        ("idefics2", t.Idefics2ForConditionalGeneration, t.Idefics2Config, tiny_idefics2(), idefics2_inputs),
        ("idefics3", t.Idefics3ForConditionalGeneration, t.Idefics3Config, tiny_idefics3(), idefics3_inputs),
    ):
        fixture(name, model_class, config_class, config, build(config))
    tables = {str(side): position_table(side) for side in (7, 26, 27, 70)}
    save_file(tables, FOLDER / "positions.safetensors")


if __name__ == "__main__":
    main()
