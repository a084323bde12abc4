"""Training on a CUDA device: what the CPU tests cannot see."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from m4train.config import AdapterConfig, FreezeConfig, FreezeRule
from m4train.training.adapters import apply_adapters
from m4train.training.engines import make_engine
from m4train.training.freezing import apply_freezing
from tests.distributed.cases import Case, build
from tests.gpu.device import DEVICE, ON_A_GPU, ON_CPU, needs_cuda, never_waiting
from tests.helpers.training import IDEFICS3, make_config, make_trainer, read_metrics

pytestmark = ON_A_GPU


@pytest.fixture(scope="module")
def alone():
    """A process group of one, for engines of several processes; DeepSpeed holds on to the first group of a process."""
    from tests.helpers.distributed import free_port

    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
            patch.setenv(key, value)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        yield
        dist.destroy_process_group()


def _train(case, run_dir, precision="bf16", watched=lambda trainer: None, **trainer_settings):
    config, model, shape = build(case, str(run_dir))
    config.trainer.precision = precision
    for key, value in trainer_settings.items():
        setattr(config.trainer, key, value)
    engine = make_engine(config)
    trainer = make_trainer(config, model, engine, packs=case.packs, shape=shape)
    watched(trainer)
    try:
        trainer.train()
    finally:
        engine.shutdown()
    return engine, read_metrics(run_dir)


@pytest.mark.parametrize("model", ["idefics", "idefics2", "idefics3"])
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_bf16_learns_from_fp32_storage_and_state(engine, model, tmp_path, alone):
    made, lines = _train(Case(engine, model, packs=6), tmp_path)
    assert made.device.type == DEVICE.type
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {t.dtype for key, t in made.tensors().items() if not key.startswith("guard")} == {torch.float32}
    assert lines[-1]["memory_gib"] > 0
    if engine != "fsdp2" and not ON_CPU:
        assert all(group["fused"] for group in made.optimizer.param_groups)


@pytest.fixture
def whole_fp32():
    """Products of fp32 are not made in TF32. (monkeypatch cannot put these two back.)"""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


def test_the_curve_is_that_of_the_cpu(tmp_path, monkeypatch, whole_fp32):
    case = Case("single", "idefics3", packs=6, steps=6)
    _, device = _train(case, tmp_path / "cuda", "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        _, host = _train(case, tmp_path / "cpu", "fp32")
    for a, b in zip(host, device, strict=True):
        assert b["data_hash"] == a["data_hash"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("model", ["idefics", "idefics2", "idefics3"])
@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_no_step_between_logged_ones_waits_for_the_device(engine, model, tmp_path, alone):
    """CUDA raises an error wherever torch would wait."""

    def watch(trainer):
        run = trainer._run

        def watched(batch, *rest):
            with never_waiting(3 <= trainer.step + 1 <= 4):
                return run(batch, *rest)

        trainer._run = watched

    case = Case(engine, model, packs=6, steps=5, weighted=True)
    settings = {"log_every": 5, "save_every": 100, "neftune_alpha": 5.0, "skip_outliers": 6.0}
    _, lines = _train(case, tmp_path, watched=watch, **settings)
    assert [line["step"] for line in lines] == [1, 5]


@needs_cuda
def test_sync_debugging_notices_a_read():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero2"])
def test_qlora_trains_and_goes_on(engine, tmp_path, alone):
    pytest.importorskip("bitsandbytes")
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    case = Case(engine, "idefics3", packs=6, steps=8, adapter="qlora")
    whole = _train(case, tmp_path / "whole")[1]
    for stop_after in (3, None):
        broken = _train(case, tmp_path / "broken", stop_after=stop_after)[1]
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert [line["loss"] for line in broken] == pytest.approx([line["loss"] for line in whole], rel=1e-2)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon"])
def test_other_optimizers_learn(optimizer, tmp_path):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = make_config(tmp_path, max_steps=8, precision="bf16")
    config.optimizer.name = optimizer
    _, model, _ = build(Case("single", "idefics3"), str(tmp_path))
    make_trainer(config, model, shape=IDEFICS3).train()
    lines = read_metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_frozen_layers_in_bf16_beside_fp32_adapters(tmp_path):
    config, model, shape = build(Case("single", "idefics3"), str(tmp_path))
    config.trainer.precision, config.freeze = "bf16", FreezeConfig([FreezeRule()], frozen_dtype="bf16")
    config.optimizer.lr = 1e-2
    config.adapter = AdapterConfig(kind="dora", rank=4, targets={"text": ["q_proj"], "vision": ["q_proj"]})
    apply_adapters(model, config.adapter)
    apply_freezing(model, FreezeConfig([FreezeRule(part="connector", trainable=True)]))
    engine = make_engine(config)
    make_trainer(config, model, engine, packs=6, shape=shape).train()
    for parameter in engine.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[-3:]) < sum(losses[:3])


OFFLOADED = [(engine, outliers) for engine in ("fsdp2", "zero1", "zero2", "zero3") for outliers in (0.0, 6.0)]


@pytest.mark.parametrize(("engine", "outliers"), OFFLOADED)
def test_offloading_keeps_the_curve(engine, outliers, tmp_path, alone):
    """Optimizer and shards in CPU memory change nothing; neither does a flag that was made on the device."""
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
    case = Case(engine, "idefics3", packs=6, steps=6)
    _, there = _train(case, tmp_path / "device", "fp32")
    _, here = _train(dataclasses.replace(case, offload=True), tmp_path / "host", "fp32", skip_outliers=outliers)
    assert [line["loss"] for line in here] == pytest.approx([line["loss"] for line in there], rel=1e-4)
    assert here[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_a_deterministic_run_continues_to_the_last_bit(engine, tmp_path, alone, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        case = Case(engine, "idefics3", packs=6, steps=6)
        whole = _train(case, tmp_path / "whole")[1]
        for stop_after in (3, None):
            broken = _train(case, tmp_path / "broken", stop_after=stop_after)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert [line["loss"] for line in broken] == [line["loss"] for line in whole]
    assert [line["grad_norm"] for line in broken] == [line["grad_norm"] for line in whole]
