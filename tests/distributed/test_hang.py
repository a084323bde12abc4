"""A rank that hangs is named, with its stage and samples, and the run ends."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.distributed import free_port

ROOT = Path(__file__).parents[2]
CHILD = """
    import sys, time
    import torch
    torch.set_num_threads(1)
    from m4train.training.engines import make_engine
    from tests.helpers.training import FakeLoader, TinyModel, make_config, make_trainer

    config = make_config(sys.argv[1], max_steps=50, hang_timeout=12.0)
    config.engine.name = "ddp"
    engine = make_engine(config)
    model = TinyModel()
    if engine.rank == 1:
        if sys.argv[2] == "forward":
            model.layers[1].register_forward_hook(lambda *_: time.sleep(600) if trainer.step == 3 else None)
    trainer = make_trainer(config, model, engine)
    if engine.rank == 1 and sys.argv[2] == "fetch":
        def slow():
            for step in FakeLoader(micro=8, rank=1, world_size=2):
                if step.step == 4:
                    time.sleep(600)
                yield step
        trainer.loader = slow()
    trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fetch", "forward"])
def test_a_stuck_rank_is_named_and_the_run_ends(stage, tmp_path):
    import os

    port, children = free_port(), []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), stage]
        children.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [child.communicate(timeout=300)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [86, 86], errors
    table = [line for line in errors[0].splitlines() if line.startswith("rank ")]
    assert len(table) == 2, errors[0]
    assert f"rank 1: in {stage} of step 4" in table[1]
    assert "in fetch of step 4" in table[0] or "in backward of step 4" in table[0]
    if stage == "forward":
        from tests.helpers.training import make_pack

        assert make_pack(25)[0].documents[0].key in table[1]
