"""The reference side of the model parity tests: transformers models with the same perturbed weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.models import perturb
from tests.helpers.rounding import apart, assert_near, own_error, widened

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


@torch.no_grad()
def rounding(model: nn.Module, inputs: dict[str, Any]) -> float:
    """The error of rounding that a model makes itself, in the logits of real tokens."""
    mask = inputs.get("attention_mask")
    real = slice(None) if mask is None else mask.bool()
    return own_error(lambda network, given: network(**given).logits[real], model, inputs)


def exact_gradients(
    model: nn.Module, loss: Callable[[nn.Module, dict[str, Any]], Tensor], inputs: Any
) -> dict[str, Tensor]:
    """The gradients of `loss(model, inputs)` in float64."""
    model = widened(model)
    return gradients(model, loss(model, widened(inputs)))


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The gradients of the whole model differ by no more than rounding, which moves `theirs` away from `exact`."""
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-3
    assert ours.keys() == theirs.keys()
    assert_near(ours, theirs, apart(theirs, exact))


@torch.no_grad()
def assert_half_precision(theirs: nn.Module, ours: nn.Module, inputs: dict[str, Tensor]) -> None:
    """In bf16 ours is as near to fp32 as the reference is with its own attention kernels, and nearer to it than fp32 is."""
    real = inputs["attention_mask"].bool()
    exact = theirs(**inputs).logits[real]
    theirs.bfloat16()
    kernels = []
    for kernel in ("eager", "sdpa"):
        theirs.set_attn_implementation(kernel)
        kernels.append(theirs(**inputs).logits[real].float() - exact)
    error = max(float(kernel.abs().mean()) for kernel in kernels)
    largest = max(float(kernel.abs().max()) for kernel in kernels)
    actual = ours.bfloat16()(**inputs).logits[real].float() - exact
    assert actual.abs().mean() < 1.25 * error
    assert (actual - kernels[-1]).abs().mean() < error
    assert (actual - kernels[-1]).abs().max() < 2 * largest
