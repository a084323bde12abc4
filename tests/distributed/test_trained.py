"""What trains may change when a run goes on under engines of several processes; ZeRO refuses what it cannot count."""

import os
import tempfile

import pytest

from m4train.training.engines import make_engine
from tests.helpers.distributed import run_distributed
from tests.helpers.training import make_trainer, read_metrics
from tests.unit.training.checkpoints.test_trained import STEPS, STOP, by_hand, config_of, model_of

PART, BLOCK = ("without vision", "all"), ("without a block", "without vision")
CELLS = [(engine, engine, PART) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")] + [
    ("ddp", "ddp", BLOCK),
    ("zero2", "fsdp2", BLOCK),
    ("fsdp2", "zero1", BLOCK),
    ("zero3", "zero3", BLOCK),
]


def _train(run_dir, engine, rules, stop_after, **settings):
    config = config_of(run_dir, rules, stop_after=stop_after, micro_batch_size=2, worst_batch_first=False)
    config.engine.name = engine
    for key, value in settings.items():
        setattr(config.engine, key, value)
    made = make_engine(config)
    make_trainer(config, model_of(config), made).train()
    made.barrier()


def _runs():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    found = {}
    for number, (first, then, (before, after)) in enumerate(CELLS):
        run_dir = os.path.join(box[0], str(number))
        _train(run_dir, first, before, STOP)
        try:
            _train(run_dir, then, after, None)
            found[number] = [line["loss"] for line in read_metrics(run_dir)]
        except Exception as error:
            found[number] = f"{type(error).__name__}: {error}"
    _train(os.path.join(box[0], "native"), "zero2", PART[0], STOP, checkpoint="native")
    try:
        _train(os.path.join(box[0], "native"), "zero2", PART[1], None)
    except Exception as error:
        found["native"] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.slow
def test_moments_are_kept_under_every_engine_or_it_says_why_not():
    """Within rounding; a part that joins is a group of its own under ZeRO, a block of a part that trains already is not."""
    found = run_distributed(_runs, 2, timeout=300)[0]
    for number, (first, then, change) in enumerate(CELLS):
        name, got = f"{first} -> {then}, {change}", found[number]
        if change == BLOCK and then.startswith("zero"):
            assert got.startswith("CheckpointError: Checkpoint "), name
            assert "optimizer/step is 0 of layers.0." in got or "but 0 of layers.0." in got, (name, got)
            assert got.endswith("go on under engine=single, ddp or fsdp2, or set resume_optimizer=fresh."), (name, got)
            continue
        assert got == pytest.approx(by_hand(*change), rel=1e-5), name
        assert len(got) == STEPS
    assert found["native"].startswith("CheckpointError")
    assert "engine.checkpoint=portable" in found["native"]
