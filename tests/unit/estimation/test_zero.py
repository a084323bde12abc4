"""What DeepSpeed's early stages hold of a model of fake tensors, without DeepSpeed and other ranks."""

import json

import pytest

from m4train.estimation.ranks import rank_memory, sizes
from m4train.estimation.step import BatchShape
from m4train.estimation.zero import _overlapping
from m4train.families import FAMILIES
from tests.unit.estimation.test_step import ARCHITECTURES, _config

RANKS = 4


def _found(engine, passes=1, offload=False, file=None):
    config = _config("idefics3", "full", True)
    config.engine.name, config.engine.offload, config.engine.deepspeed = engine, offload, file
    config.trainer.micro_batch_size, config.trainer.global_batch_size = 1, RANKS * passes
    architecture = FAMILIES["idefics3"].load("Config").from_dict(ARCHITECTURES["idefics3"])
    shape = BatchShape(32, 1)  # so that gradients and the update are most of it
    return rank_memory(config, architecture, shape, RANKS, None, "cpu"), sizes(config, architecture, shape, None)


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_the_optimizer_works_on_a_share_that_is_held_once_more(engine):
    memory, size = _found(engine)
    assert memory.components["master copy"] == pytest.approx(size.trained_bytes / RANKS, rel=0.01)
    assert memory.components["optimizer"] == pytest.approx(2 * size.trained_bytes / RANKS, rel=0.01)
    assert memory.components["parameters"] == size.trained_bytes


def test_zero1_sums_whole_gradients_and_zero2_its_part_of_them():
    one, two = (_found(engine, passes=2) for engine in ("zero1", "zero2"))
    assert one[0].components["gradients"] == one[1].trained_bytes
    assert two[1].trained_bytes / RANKS <= two[0].components["gradients"] < two[1].trained_bytes


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_what_is_on_the_host_is_not_on_the_device(engine):
    plain, size = _found(engine)
    moved, _ = _found(engine, offload=True)
    assert not {"optimizer", "master copy", "offloaded"} & moved.components.keys()
    assert moved.host >= 4 * size.trained_bytes / RANKS
    assert moved.tensors < plain.tensors


def test_the_bucket_is_as_large_as_the_users_file_says(tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 200_000}}))
    usual, small = (_found("zero2", file=given)[0].components for given in (None, str(file)))
    assert usual["buckets"] == 4 * 50_000_000
    assert small["buckets"] == 4 * 200_000
    assert small["gradients"] > 0  # full buckets have been reduced before the peak


def test_a_parameter_that_ranks_share_is_whole_on_each():
    assert [_overlapping([6, 2, 4], 3, rank) for rank in range(3)] == [6, 8, 4]
    assert [_overlapping([1, 1], 3, rank) for rank in range(3)] == [1, 1, 0]
