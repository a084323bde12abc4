"""The reference side of the model parity tests: transformers models with the same perturbed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import perturb

transformers = pytest.importorskip("transformers")


def reference_pair(kind: str, config: dict[str, Any], ours: type, folder: Path, **load: Any) -> tuple[nn.Module, Any]:
    """A perturbed transformers model, and ours loaded from the folder the former saved."""
    config_class = getattr(transformers, f"{kind}Config")
    values = {key: value for key, value in config.items() if key != "model_type"}
    head = "ForVisionText2Text" if kind == "Idefics" else "ForConditionalGeneration"
    reference = getattr(transformers, f"{kind}{head}")(config_class(**values))
    perturb(reference)
    reference.eval()
    reference.save_pretrained(folder)
    return reference, ours.from_pretrained(folder, **load)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Largest difference below `tolerance` of the largest gradient of the whole model."""
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 1e-3
    worst = max((float((ours[n] - theirs[n]).abs().max()), n) for n in theirs)
    assert worst[0] <= tolerance * largest, worst


def closest(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@torch.no_grad()
def assert_half_precision(
    theirs: nn.Module, ours: nn.Module, inputs: dict[str, Tensor], mean: float | None = 1e-2
) -> None:
    """In bf16 ours is near the reference's bf16, and no further from fp32 than that is.

    `mean` bounds the mean difference between the two; None takes the mean error of the reference's bf16 itself, for a model
    whose rounding alone reaches the bound (the reference's own attention kernels then differ by as much).
    """
    real = inputs["attention_mask"].bool()
    exact = theirs(**inputs).logits[real]
    reference = theirs.bfloat16()(**inputs).logits[real].float()
    actual = ours.bfloat16()(**inputs).logits[real].float()
    error = (reference - exact).abs().mean()
    assert (actual - reference).abs().max() < 0.15
    assert (actual - reference).abs().mean() < (error if mean is None else mean)
    assert (actual - exact).abs().mean() < 1.1 * error
