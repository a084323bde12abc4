"""The memory that `m4train estimate` expects of each of several ranks, against what two of them really hold."""

from __future__ import annotations

import tempfile
import time

import pytest
import torch
from torch import Tensor

from m4train.config import Config
from m4train.estimation.peak import Peak
from m4train.estimation.ranks import rank_memory
from m4train.estimation.step import BatchShape, worst_case
from m4train.families import FAMILIES
from m4train.training.engines import make_engine
from m4train.training.equip import equip
from tests.helpers.distributed import run_distributed
from tests.unit.estimation.test_step import ARCHITECTURES
from tests.unit.estimation.test_step import _config as step_config

pytestmark = pytest.mark.full
SHAPE = BatchShape(256, 6)
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
STEPS = 2  # DeepSpeed knows from the second on what it need not give away
BUCKET = 4 * 50_000_000  # bytes, much more than the model


def config_of(engine: str, adapter: str, checkpointing: bool, precision: str = "fp32", passes: int = 1) -> Config:
    config = step_config("idefics3", adapter, checkpointing, precision)
    config.engine.name = engine
    config.trainer.micro_batch_size = config.data.images_per_pack = 1
    config.trainer.global_batch_size = 2 * passes
    return config


def patient(function):
    """gloo's own thread lets go of a tensor a moment after the collective is done: waits for that, so that it counts once."""

    def call(tensor, *args, **kwargs):
        known = tensor._use_count()
        result = function(tensor, *args, **kwargs)
        while tensor._use_count() > known:
            time.sleep(1e-4)
        return result

    return call


def measure(
    adapter: str, checkpointing: bool, precision: str, passes: int, engines: tuple[str, ...] = ENGINES
) -> dict[str, float]:
    """Bytes at the peak of a real step under each engine."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce = patient(dist.all_reduce)
    found = {}
    for name in engines:
        config = config_of(name, adapter, checkpointing, precision, passes)
        with tempfile.TemporaryDirectory() as folder:
            engine = make_engine(config)
            config.run_dir = engine.broadcast(folder)
            architecture = FAMILIES["idefics3"].load("Config").from_dict(ARCHITECTURES["idefics3"])
            batch = worst_case(architecture, SHAPE)
            peak = Peak(torch.device("cpu"))
            model = FAMILIES["idefics3"].model_class(architecture)
            equip(model, config)
            engine.prepare(model)
            model.train()
            most = 0.0
            for _ in range(STEPS):
                states = [v for state in engine.optimizer.state.values() for v in state.values()]
                peak.begin([*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, Tensor))])
                for number in range(passes):
                    last = number == passes - 1
                    with engine.accumulation(last):
                        engine.backward(engine.forward(batch).loss, last)
                engine.update(1.0, 1.0)
                most = max(most, peak.end()[0])
            engine.barrier()
        found[name] = most
        engine.shutdown() if name == engines[-1] else None
    return found


@pytest.mark.parametrize(
    ("adapter", "checkpointing", "precision", "passes"),
    [("full", False, "fp32", 1), ("full", True, "bf16", 1), ("full", True, "fp32", 3), ("lora", False, "bf16", 2)],
)
def test_each_engine_holds_what_is_expected(adapter, checkpointing, precision, passes):
    measured = run_distributed(measure, 2, adapter, checkpointing, precision, passes, timeout=300)
    architecture = FAMILIES["idefics3"].load("Config").from_dict(ARCHITECTURES["idefics3"])
    for name in ENGINES:
        memory = rank_memory(
            config_of(name, adapter, checkpointing, precision, passes), architecture, SHAPE, 2, None, "cpu"
        )
        most = max(rank[name] for rank in measured)
        expected, bucket = memory.tensors, BUCKET if name.startswith("zero") else 0.0
        assert expected == pytest.approx(most, rel=0.05), (name, memory.components, most)
        assert expected - bucket == pytest.approx(most - bucket, rel=0.05), (name, memory.components, most)
