"""A rank that hangs is named, with its stage and samples, and the run ends; ranks that differ do not hang at all."""

import threading
import time
from pathlib import Path

import pytest

from m4train.training.engines import make_engine
from m4train.training.heartbeat import EXIT_CODE
from tests.helpers.distributed import end_ranks, run_distributed, start_ranks
from tests.helpers.training import FakeLoader, FakeStep, TinyModel, join, make_config, make_pack, make_trainer

SOON = 1.0  # the timeout once a rank is known to be stuck; before, no load of the machine may look like a hang


def _train(run_dir, stage):
    """Rank 1 stops for ever in step 4. The timeout becomes short when that has happened, so that nothing depends on speed."""
    config = make_config(run_dir, max_steps=50, hang_timeout=3600.0)
    config.engine.name = "ddp"
    engine, model = make_engine(config), TinyModel()
    trainer = make_trainer(config, model, engine)
    stalled = Path(run_dir) / "stalled" / "rank-00001.txt"

    def hang():
        trainer.heart.timeout = SOON
        time.sleep(3600)

    if engine.rank == 1 and stage == "forward":
        model.layers[1].register_forward_hook(lambda *_: hang() if trainer.step == 3 else None)
    elif engine.rank == 1:
        trainer.loader = _stuck_at(4, hang)
    else:
        threading.Thread(target=_follow, args=(stalled, trainer.heart), daemon=True).start()
    trainer.train()


def _stuck_at(number, hang):
    for step in FakeLoader(micro=8, rank=1, world_size=2):
        if step.step == number:
            hang()
        yield step


def _follow(stalled, heart):
    """Rank 0 waits for rank 1 by now, or will in a moment, and notices when its own time is up."""
    while not stalled.exists() or not any(
        f"in {stage} of step 4" in heart.describe() for stage in ("fetch", "backward")
    ):
        time.sleep(0.05)
    heart.timeout = SOON


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fetch", "forward"])
def test_a_stuck_rank_is_named_and_the_run_ends(stage, tmp_path):
    ranks = start_ranks(_train, 2, str(tmp_path / "run"), stage, folder=tmp_path)
    try:
        codes = [child.wait(timeout=300) for child in ranks]
    finally:
        end_ranks(ranks)
    said = ranks[0].said()
    assert codes == [EXIT_CODE, EXIT_CODE], said
    assert f"No progress for {SOON:.0f} s (trainer.hang_timeout)" in said
    table = [line for line in said.splitlines() if line.startswith("rank ")]
    assert table == (tmp_path / "run" / "stalled" / "ranks.txt").read_text().splitlines()
    assert len(table) == 2, said
    assert f"rank 1: in {stage} of step 4" in table[1]
    assert "in fetch of step 4" in table[0] or "in backward of step 4" in table[0]
    if stage == "forward":
        assert make_pack(25)[0].documents[0].key in table[1]


class Uneven:
    """Steps of six packs: rank 0 of two has the two without images, rank 1 the other four, with eight images."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        for step in range(1, 9):
            packs = [make_pack(number)[0] for number in range(6 * step, 6 * step + 6)]
            text = [pack for pack in packs if not pack.images.count]
            rest = [pack for pack in packs if pack.images.count]
            assert (len(text), sum(pack.images.count for pack in rest)) == (2, 8)
            mine = [text, rest][self.rank] if self.world_size == 2 else packs
            yield FakeStep(step, [join(mine)], {"steps": step})


def _losses(run_dir, name):
    config = make_config(run_dir, max_steps=8, save_every=8)
    config.engine.name = name
    engine = make_engine(config)
    trainer = make_trainer(config, TinyModel(), engine)
    trainer.loader = Uneven(engine.rank, engine.world_size)
    losses = []
    trainer.callbacks[0].on_metrics = lambda _, metrics: losses.append((metrics["loss"], metrics["grad_norm"]))
    trainer.train()
    return losses


def _under_every_engine(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return {name: _losses(f"{folder}/{name}", name) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")}


@pytest.mark.slow
def test_one_rank_without_images_beside_one_with_many(tmp_path):
    expected = _losses(tmp_path / "single", "single")
    assert len(expected) == 8
    for name, got in run_distributed(_under_every_engine, 2, str(tmp_path), timeout=400)[0].items():
        assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in expected], rel=1e-5), name
        assert [norm for _, norm in got] == pytest.approx([norm for _, norm in expected], rel=1e-4), name
