"""What may differ between a checkpoint and the run that continues it."""

import pytest

from m4train.errors import CheckpointError
from m4train.training.checkpoints.find import find_checkpoint, starts_fresh_optimizer
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def _train(config):
    return make_trainer(config, TinyModel()).train()


def test_keys_that_compute_nothing_may_change(tmp_path):
    _train(make_config(tmp_path, max_steps=4))
    config = make_config(tmp_path, max_steps=4, gradient_checkpointing=True, compile=True, deterministic=True)
    config.trainer.max_skipped_in_a_row = 99
    config.data.index_dir, config.data.cache_dir, config.data.cache_size = "indexes", "cache", 3.0
    config.data.cost.frame, config.data.max_bad_fraction, config.model.loss = 7.0, 0.5, "torch"
    assert find_checkpoint(config).step == 4


def test_a_finished_run_is_extended_with_a_fresh_optimizer_again_and_again(tmp_path):
    _train(make_config(tmp_path, max_steps=4))
    with pytest.raises(CheckpointError, match=r"trainer\.max_steps \(4 then, 6 now\)"):
        find_checkpoint(make_config(tmp_path, max_steps=6))
    for steps in (6, 8):
        longer = make_config(tmp_path, max_steps=steps)
        longer.resume_optimizer = "fresh"
        assert starts_fresh_optimizer(find_checkpoint(longer), longer)
        assert _train(longer).step == steps
        assert not starts_fresh_optimizer(find_checkpoint(longer), longer)  # the same command goes on with its own
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))
