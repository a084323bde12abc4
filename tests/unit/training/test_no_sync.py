"""Between two logged steps the host never waits for the device: nothing on the way reads a tensor's value.

On the CPU reading costs nothing and would go unnoticed, so every way to read is watched; tests/gpu asks CUDA itself.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m4train.training.engines import make_engine
from tests.distributed.cases import Case, build
from tests.helpers.training import make_trainer

READERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
DATA_DEPENDENT = ("aten.nonzero", "aten.masked_select", "aten._local_scalar_dense", "aten._unique", "aten.equal")


class _Watch(TorchDispatchMode):
    """Notes operations whose result has a shape, or is a number, that only the device knows."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(DATA_DEPENDENT):
            self.seen.append(str(func))
        if str(func).startswith(("aten.index.", "aten.index_put")):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.seen.append(f"{func} by a mask")
        return func(*args, **(kwargs or {}))


def _alone(monkeypatch):
    """A process group of one."""
    from tests.helpers.distributed import free_port

    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for key, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(key, value)


def _watched(case, run_dir, monkeypatch, change=lambda config, model: None):
    """What was read in steps 2 to 4 of a run that logs steps 1 and 5."""
    config, model, shape = build(case, str(run_dir))
    config.trainer.log_every, config.trainer.save_every = 5, 100
    change(config, model)
    engine = make_engine(config)
    trainer = make_trainer(config, model, engine, packs=case.packs, shape=shape)
    run, seen = trainer._run, []

    def watched(batch, *rest):
        if not 2 <= trainer.step + 1 <= 4:
            return run(batch, *rest)
        with monkeypatch.context() as patch, _Watch() as watch:
            for name in READERS:
                patch.setattr(torch.Tensor, name, _noting(name, getattr(torch.Tensor, name), seen))
            result = run(batch, *rest)
        seen.extend(watch.seen)
        return result

    trainer._run = watched
    try:
        assert trainer.train().step == 5
    finally:
        engine.shutdown()
    return seen


def _noting(name, function, seen):
    def reading(self, *args, **options):
        seen.append(name)
        return function(self, *args, **options)

    return reading


@pytest.mark.parametrize("model", ["tiny", "idefics", "idefics2", "idefics3"])
@pytest.mark.parametrize(
    "engine", ["single", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp2"))]
)
def test_nothing_is_read_between_logged_steps(engine, model, tmp_path, monkeypatch):
    _alone(monkeypatch)
    case = Case(engine, model, packs=3, steps=5, recompute=model == "idefics3", weighted=True, ramp=True)

    def change(config, model):
        config.trainer.neftune_alpha, config.trainer.skip_outliers = 5.0, 6.0

    assert _watched(case, tmp_path, monkeypatch, change) == []


def test_a_read_is_noticed(tmp_path, monkeypatch):
    def change(config, model):
        model.register_forward_hook(lambda m, i, output: output.loss.item() and None)

    assert _watched(Case("single", "tiny", packs=3, steps=5), tmp_path, monkeypatch, change).count("item") == 3 * 2
