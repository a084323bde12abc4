"""Every cell of the table engine x optimizer x adapter that is not refused makes two steps and learns."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch

from m4train.config import ADAPTERS, ENGINES, OPTIMIZERS
from m4train.config.combinations import why_not
from m4train.training.engines import make_engine
from tests.distributed.cases import Case, build
from tests.helpers.distributed import run_distributed
from tests.helpers.training import full_parameters, make_trainer, read_metrics

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
# Those of AdamW run in test_equality.py as well, except for a few.
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
    _check(QUICK)


def _stopped_muon():
    """Losses under fsdp2 of a whole run, and of one that is continued from its checkpoint."""
    losses = []
    for stops in ((None,), (2, None)):
        with tempfile.TemporaryDirectory() as scratch:
            run_dir = None
            for stop in stops:
                config, model, shape = build(Case("fsdp2", "idefics3", packs=3, steps=4), run_dir or scratch)
                config.optimizer.name, config.trainer.stop_after = "muon", stop
                engine = make_engine(config)
                run_dir = config.run_dir = engine.broadcast(config.run_dir)
                make_trainer(config, model, engine, packs=3, shape=shape).train()
                engine.barrier()
            losses.append([line["loss"] for line in read_metrics(run_dir)])
            engine.barrier()
    return losses


@pytest.mark.slow
def test_muon_continues_from_shards_to_the_last_bit():
    whole, stopped = run_distributed(_stopped_muon, 2)[0]
    assert len(whole) == 4
    assert stopped == whole


def _moved_by_muon():
    """How far each hidden matrix of the text model moved in three steps, under ddp and under fsdp2.

    "exact" is ddp with the iterations of Muon in float64 instead of bf16.
    """
    moved = {}
    for name in ("ddp", "fsdp2", "exact"):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratch:
            if name == "exact":
                patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
            config, model, shape = build(
                Case("ddp" if name == "exact" else name, "idefics3", packs=3, steps=3), scratch
            )
            config.optimizer.name = "muon"
            before = {key: tensor.clone() for key, tensor in model.named_parameters()}
            engine = make_engine(config)
            config.run_dir = engine.broadcast(config.run_dir)
            make_trainer(config, model, engine, packs=3, shape=shape).train()
            after = full_parameters(engine)
            matrices = [key for key in before if "text_model.layers" in key and key.endswith("proj.weight")]
            moved[name] = {key: after[key] - before[key] for key in matrices} if engine.rank == 0 else {}
            engine.barrier()
    return moved


@pytest.mark.slow
def test_muon_makes_whole_matrices_of_shards():
    """Its steps under fsdp2 are those of ddp except for the bf16 of its iterations, which alone move those of ddp as far."""
    moved = run_distributed(_moved_by_muon, 2)[0]
    assert len(moved["ddp"]) == 14
    for key, whole in moved["ddp"].items():
        error = (moved["exact"][key] - whole).norm()
        assert 0 < error < 0.1 * whole.norm(), key
        assert (moved["fsdp2"][key] - whole).norm() < 2 * error, key


@pytest.mark.slow
@pytest.mark.full
def test_two_processes_in_every_cell():
    _check(SHARED)
