"""Models on CUDA: half precision, compiled blocks, losses, and no wait for the device within a step."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch
from m4train.models.loss import LMHead, token_loss
from m4train.training.compiling import compile_blocks
from tests.gpu.device import DEVICE, ON_A_GPU, never_waiting
from tests.helpers.rounding import apart, assert_near
from tests.unit.models.test_packing import FAMILIES, documents_of, flat_gradient, make

pytestmark = ON_A_GPU

# Heads that the variable-length kernel takes: the tiny models have smaller ones.
WIDE: dict[str, dict[str, Any]] = {
    "idefics": {"hidden_size": 64, "vision_config": {"embed_dim": 48, "num_attention_heads": 3}},
    "idefics2": {"vision_config": {"hidden_size": 48}, "perceiver_config": {"resampler_head_dim": 16}},
    "idefics3": {"vision_config": {"hidden_size": 48}},
}


def model_and_batch(family: str) -> tuple[Any, PackedBatch]:
    """fp32 on the CPU."""
    model, build, per_image = make(family, torch.float32, **WIDE[family])
    documents = documents_of([(9, 1), (140, 2), (33, 0)], per_image)
    return model, build([(ids, [image.float() for image in images]) for ids, images in documents])


def losses_and_gradient(model: nn.Module, batch: PackedBatch, half: bool = True) -> tuple[Tensor, Tensor]:
    """The losses of all tokens, and the gradient of their sum, on the CPU; `half` computes in bf16 as training does."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        output = model(batch.to(device), z_loss=0.01)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    return output.token_losses.cpu(), flat_gradient(model).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_near_fp32_on_the_cpu(family: str) -> None:
    """It is no further off than half precision on the CPU."""
    model, batch = model_and_batch(family)
    exact, half = (losses_and_gradient(model, batch, half) for half in (False, True))
    for found, other, best in zip(losses_and_gradient(model.to(DEVICE), batch), half, exact):
        assert_near(found, best, apart(other, best))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_waits_for_the_device(family: str) -> None:
    model, batch = model_and_batch(family)
    model.to(DEVICE)
    batch = batch.to(DEVICE)
    for again in (False, True):  # the first pass makes the tables that are kept
        with never_waiting(again):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(batch).loss
            loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks(family: str) -> None:
    torch._dynamo.reset()
    model, batch = model_and_batch(family)
    exact = losses_and_gradient(model, batch, half=False)
    eager = losses_and_gradient(model.to(DEVICE), batch)
    compile_blocks(model.blocks())
    for found, other, best in zip(losses_and_gradient(model, batch), eager, exact):
        assert_near(found, other, apart(other, best), times=2)


KINDS = [
    pytest.param("torch", marks=pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="older torch")),
    pytest.param(
        "liger", marks=pytest.mark.skipif(not find_spec("liger_kernel"), reason="liger-kernel is not installed")
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_losses(kind: str, dtype: torch.dtype) -> None:
    def results(kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        head = LMHead(64, 1000)
        head.weight.data = torch.randn(1000, 64, generator=generator) / 8
        head.to(DEVICE, dtype)
        hidden = torch.randn(300, 64, generator=generator).to(DEVICE, dtype).requires_grad_()
        targets = torch.randint(0, 1000, (300,), generator=generator).to(DEVICE)
        loss, losses = token_loss(head, hidden, targets, kind=kind)
        (3 * loss).backward()
        return loss, losses, hidden.grad, head.weight.grad

    for actual, expected, exact in zip(
        results(kind, dtype), results("chunked", dtype), results("chunked", torch.float64)
    ):
        assert_near(actual, expected, apart(expected, exact))
