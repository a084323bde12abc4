"""What FSDP2 itself holds of a model of fake tensors, among ranks that are not there."""

import tempfile

import pytest
import torch
import torch.distributed as dist

from m4train.estimation.ranks import rank_memory, sizes
from m4train.estimation.step import BatchShape
from m4train.families import FAMILIES
from tests.unit.estimation.test_step import ARCHITECTURES, _config


def _subject(family, adapter="full", checkpointing=True, precision="bf16", **trainer):
    config = _config(family, adapter, checkpointing, precision)
    config.engine.name = "fsdp2"
    for key, value in {"micro_batch_size": 1, "global_batch_size": 1, **trainer}.items():
        setattr(config.trainer, key, value)
    architecture = FAMILIES[family].load("Config").from_dict(ARCHITECTURES[family])
    return config, architecture, BatchShape(256, 6, 16 if family == "idefics2" else 0)


@pytest.mark.parametrize("family", list(ARCHITECTURES))
@pytest.mark.parametrize("adapter", ["full", "qlora"])
def test_every_rank_holds_its_share(family, adapter):
    config, architecture, shape = _subject(family, adapter)
    size = sizes(config, architecture, shape, None)
    for ranks in (2, 8, 64):
        found = rank_memory(config, architecture, shape, ranks, None, "cpu").components
        shared = (size.trained_bytes + size.frozen_bytes) / ranks
        buffers = found["parameters"] - size.whole_bytes - shared  # and what is added so that rows divide among many
        assert 0 <= buffers < 0.05 * shared + 150_000
        assert found["optimizer"] == pytest.approx(2 * size.trained_bytes / ranks, rel=0.05, abs=20_000)
        assert found["gathered"] < size.whole_weights


def test_gradients_are_there_from_the_second_micro_batch_on():
    config, architecture, shape = _subject("idefics3", global_batch_size=2)
    one = rank_memory(config, architecture, shape, 2, None, "cpu").components["gradients"]
    config.trainer.global_batch_size = 8
    more = rank_memory(config, architecture, shape, 2, None, "cpu").components["gradients"]
    assert more >= sizes(config, architecture, shape, None).trained_bytes / 2 > one


def test_shards_within_a_node_do_not_shrink_with_more_nodes():
    config, architecture, shape = _subject("idefics3")
    eight = rank_memory(config, architecture, shape, 8, None, "cpu")
    config.engine.shard_within_node = True
    assert rank_memory(config, architecture, shape, 64, None, "cpu") == eight


def test_a_process_group_is_left_as_it_was():
    given = _subject("idefics3")
    alone = rank_memory(*given, 1, None, "cpu")
    assert not dist.is_initialized()
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", store=dist.FileStore(file.name, 1), rank=0, world_size=1)
        try:
            assert rank_memory(*given, 1, None, "cpu") == alone
            ones = torch.ones(2)
            dist.all_reduce(ones)
            assert ones.tolist() == [1.0, 1.0]
        finally:
            dist.destroy_process_group()
