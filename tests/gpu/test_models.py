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
from tests.unit.models.test_packing import FAMILIES, documents_of, flat_gradient, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

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


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_near_fp32_on_the_cpu(family: str) -> None:
    model, batch = model_and_batch(family)
    expected = model(batch, z_loss=0.01)
    expected.loss.backward()
    gradient = flat_gradient(model)
    model.zero_grad(set_to_none=True)
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        output = model(batch.to("cuda"), z_loss=0.01)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert abs(output.loss.item() - expected.loss.item()) < 0.02 * expected.loss.item()
    assert torch.cosine_similarity(flat_gradient(model).cpu(), gradient, dim=0) > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_waits_for_the_device(family: str) -> None:
    model, batch = model_and_batch(family)
    model.cuda()
    batch = batch.to("cuda")
    for mode in ("default", "error"):  # the first pass makes the tables that are kept
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(batch).loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks(family: str) -> None:
    torch._dynamo.reset()
    model, batch = model_and_batch(family)
    model.cuda()
    batch = batch.to("cuda")
    losses, gradients = [], []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model.blocks())
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(flat_gradient(model))
    assert abs(losses[1] - losses[0]) < 0.01 * losses[0]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


KINDS = [
    pytest.param("torch", marks=pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="older torch")),
    pytest.param(
        "liger", marks=pytest.mark.skipif(not find_spec("liger_kernel"), reason="liger-kernel is not installed")
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_losses(kind: str, dtype: torch.dtype) -> None:
    def results(kind: str) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        head = LMHead(64, 1000)
        head.weight.data = torch.randn(1000, 64, generator=generator) / 8
        head.to("cuda", dtype)
        hidden = torch.randn(300, 64, generator=generator).to("cuda", dtype).requires_grad_()
        targets = torch.randint(0, 1000, (300,), generator=generator).cuda()
        loss, losses = token_loss(head, hidden, targets, kind=kind)
        (3 * loss).backward()
        return loss, losses, hidden.grad, head.weight.grad

    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for actual, expected in zip(results(kind), results("chunked")):
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
