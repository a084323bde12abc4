"""Every cell of the table engine x optimizer x adapter that is not refused makes two steps and learns."""

import itertools
import tempfile
from pathlib import Path

import pytest

from m4train.combinations import why_not
from m4train.config import ADAPTERS, ENGINES, OPTIMIZERS
from m4train.training.engines import make_engine
from tests.distributed.cases import Case, build
from tests.helpers.distributed import run_distributed
from tests.helpers.training import make_trainer, read_metrics

CELLS = [cell for cell in itertools.product(ENGINES, OPTIMIZERS, ADAPTERS) if why_not(*cell) is None]


def _losses(run_dir, engine, optimizer, adapter):
    config, model, shape = build(Case(engine, "idefics3", packs=3, steps=2, adapter=adapter), str(run_dir))
    config.optimizer.name = optimizer
    config.trainer.save_every, config.trainer.worst_batch_first = 100, False
    make_trainer(config, model, make_engine(config), packs=3, shape=shape).train()
    return [line["loss"] for line in read_metrics(run_dir)]


def _all(cells):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    found = {}
    for cell in cells:
        try:
            found[cell] = _losses(Path(box[0]) / "-".join(cell), *cell)
        except Exception as error:
            found[cell] = repr(error)
            dist.barrier()
    return found


SHARED = [cell for cell in CELLS if cell[0] != "single"]
# Those of AdamW run in test_equality.py as well, but for a few.
QUICK = [("ddp", optimizer, adapter) for optimizer in ("adamw_8bit", "muon") for adapter in ("none", "qlora")]
QUICK.append(("fsdp2", "muon", "none"))


def _check(cells):
    found = run_distributed(_all, 2, cells, timeout=900)[0]
    for cell, losses in found.items():
        assert not isinstance(losses, str), (cell, losses)
        assert losses[0] != losses[1], cell
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "adapter"), [cell[1:] for cell in CELLS if cell[0] == "single"])
def test_one_process(optimizer, adapter, tmp_path):
    first, second = _losses(tmp_path, "single", optimizer, adapter)
    assert first != second


@pytest.mark.slow
def test_two_processes():
    found = _check(QUICK)
    # Of shards Muon makes whole matrices: its steps are those of ddp but for the bf16 of its iterations.
    sharded, whole = (found[engine, "muon", "none"] for engine in ("fsdp2", "ddp"))
    assert sharded == pytest.approx(whole, rel=1e-3)
    assert abs(whole[1] - whole[0]) > 1e-2 * whole[0]


@pytest.mark.slow
@pytest.mark.full
def test_two_processes_in_every_cell():
    _check(SHARED)
