"""Two ranks, one with images and one without: no rank waits for ever, and their gradients are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from m4train.batch import PackedBatch
from m4train.training.compiling import compile_blocks
from m4train.training.engines.deepspeed import _library
from m4train.training.engines.processes import Processes
from m4train.training.gradient_checkpointing import checkpoint_blocks
from tests.helpers.distributed import run_distributed
from tests.helpers.models import SHALLOW
from tests.helpers.rounding import apart, assert_near, widened
from tests.unit.models.test_packing import documents_of, make


def fsdp2(model: nn.Module, batch: PackedBatch) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    for blocks in model.blocks().values():
        for block in blocks:
            fully_shard(block)
    fully_shard(model)
    model(batch).loss.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def fsdp2_compiled(model: nn.Module, batch: PackedBatch) -> dict[str, Tensor]:
    """As a run does it: blocks compiled, then recomputed, then sharded."""
    compile_blocks(model.blocks(), backend="aot_eager")
    checkpoint_blocks(model.blocks())
    return fsdp2(model, batch)


def zero3(model: nn.Module, batch: PackedBatch) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = _library().initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=settings, dist_init_required=False
    )
    engine.backward(engine(batch).loss)
    return {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}


KINDS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "fsdp2": fsdp2,
    "fsdp2_compiled": fsdp2_compiled,
    "zero3": zero3,
}


def gradients(model: nn.Module, batches: list[PackedBatch]) -> dict[str, Tensor]:
    """Those of all batches together, in this process alone."""
    for batch in batches:
        model(batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def compare(kind: str, family: str) -> None:
    model, build, per_image = make(family, torch.float32, **SHALLOW[family])
    exact = [build([document]) for document in documents_of([(9, 2), (14, 0)], per_image)]
    batches = [replace(b, images=replace(b.images, pixels=b.images.pixels.float())) for b in exact if b.images]
    expected, wide = gradients(model, batches), gradients(widened(model), exact)
    found = KINDS[kind](model, batches[dist.get_rank()])
    assert_near({name: 2 * gradient for name, gradient in found.items()}, expected, apart(expected, wide))


def on_every_rank(kind: str) -> None:
    processes = Processes(timedelta(minutes=5))
    for family in SHALLOW:
        compare(kind, family)
    processes.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3", pytest.param("fsdp2_compiled", marks=pytest.mark.full)])
def test_uneven_ranks(kind: str) -> None:
    run_distributed(on_every_rank, 2, kind, timeout=300)
