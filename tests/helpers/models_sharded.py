"""Two ranks, one with images and one without: their averaged gradients against those of one process.

Run by tests/unit/models/test_sharded.py: torchrun --nproc-per-node 2 -m tests.helpers.models_sharded {fsdp2,fsdp2_compiled,zero3}
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m4train.batch import PackedBatch
from m4train.training.compiling import compile_blocks
from m4train.training.engines.processes import Processes
from m4train.training.gradient_checkpointing import checkpoint_blocks
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
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=settings, dist_init_required=False
    )
    engine.backward(engine(batch).loss)
    return {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}


ONE_LAYER = {"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 1}}
SIZES: dict[str, dict[str, Any]] = {
    "idefics": {"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 1}},
    "idefics2": {**ONE_LAYER, "perceiver_config": {"resampler_depth": 1}},
    "idefics3": ONE_LAYER,
}


def compare(kind: str, family: str) -> None:
    model, build, per_image = make(family, torch.float32, **SIZES[family])
    batches = []
    for document in documents_of([(9, 2), (14, 0)], per_image):
        batch = build([document])
        assert batch.images is not None
        batches.append(replace(batch, images=replace(batch.images, pixels=batch.images.pixels.float())))
    for batch in batches:
        model(batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = {"fsdp2": fsdp2, "fsdp2_compiled": fsdp2_compiled, "zero3": zero3}[kind](model, batches[dist.get_rank()])
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        difference = float((2 * found[name] - gradient).abs().max())
        assert difference < 1e-5 * largest, (family, name, difference, largest)


def main(kind: str) -> None:
    processes = Processes(timedelta(minutes=5))
    for family in SIZES:
        compare(kind, family)
    processes.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
