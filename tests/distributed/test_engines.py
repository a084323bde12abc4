"""What every engine of several processes must keep: precision of what is stored, adapters that are whole, evaluation."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch

from m4train.config import AdapterConfig, FreezeConfig, FreezeRule, PartOptimizerConfig
from m4train.training import guard, precision, quantization
from m4train.training.adapters import apply_adapters
from m4train.training.checkpoints.adapter_files import load_adapter, save_adapter
from m4train.training.engines import make_engine
from m4train.training.freezing import apply_freezing
from m4train.training.parts_table import parameter_table
from tests.distributed.cases import Case, build
from tests.helpers.distributed import run_distributed
from tests.helpers.rounding import apart, assert_near
from tests.helpers.training import TinyModel, full_parameters, make_config, make_trainer, read_metrics

pytestmark = pytest.mark.slow
SHARED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def _in_folder(function, *args):
    """Calls `function(run_dir, *args)` with one new folder for all ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    return {engine: function(Path(box[0]) / engine, engine, *args) for engine in SHARED}


def _stored_dtypes(run_dir, name, half="bf16"):
    config = make_config(run_dir, max_steps=2, precision=half)
    config.engine.name = name
    config.freeze = FreezeConfig([FreezeRule(part="vision")])
    model = TinyModel().to(torch.bfloat16)
    apply_freezing(model, config.freeze)
    engine, seen = make_engine(config), []
    model.layers[0].up_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    make_trainer(config, model, engine).train()
    return {key: tensor.dtype for key, tensor in engine.tensors().items()}, seen[-1], _losses(run_dir)


def _losses(run_dir):
    """The losses of every step, of all and of each source."""
    return [row[key] for row in read_metrics(run_dir) for key in ("loss", "loss/web", "loss/chat")]


def test_what_trains_is_stored_in_fp32_with_fp32_moments_and_computed_in_bf16(tmp_path):
    losses, exact = (_stored_dtypes(tmp_path / kind, "single", kind)[2] for kind in ("bf16", "fp32"))
    results = run_distributed(_in_folder, 2, _stored_dtypes, timeout=400)[0]
    for engine, (dtypes, computed, found) in results.items():
        assert computed == torch.bfloat16, engine
        for key, dtype in dtypes.items():
            frozen = key.startswith("parameter/vision.")
            assert dtype == (torch.bfloat16 if frozen else torch.float32), (engine, key)
        assert found != exact
        assert_near(found, losses, apart(losses, exact))


def _whole_when_wrapped():
    """Parameters that DeepSpeed, which moves all that is not split yet to the device at once, is given whole."""
    import deepspeed

    whole, given = [], deepspeed.initialize

    def initialize(**options):
        whole.extend(name for name, p in options["model"].named_parameters() if p.numel())
        return given(**options)

    deepspeed.initialize = initialize
    for call in ("prepare", "place"):
        with tempfile.TemporaryDirectory() as scratch:
            config = make_config(scratch)
            config.engine.name = "zero3"
            getattr(make_engine(config), call)(TinyModel())
    return whole


def test_zero3_never_puts_a_whole_model_on_a_device():
    assert run_distributed(_whole_when_wrapped, 2) == [[], []]


def _half_base(run_dir, name, precision="bf16"):
    config, model, shape = build(Case(name, "idefics3", packs=7, steps=4, adapter="lora", recompute=True), str(run_dir))
    config.trainer.precision, config.freeze.frozen_dtype = precision, precision
    engine = make_engine(config)
    make_trainer(config, model, engine, packs=7, shape=shape).train()
    dtypes = {key: t.dtype for key, t in engine.tensors().items() if key.startswith("parameter/")}
    return dtypes, _losses(run_dir)


def test_fp32_adapters_inside_frozen_bf16_layers(tmp_path):
    """Two dtypes in one sharded unit."""
    from m4train.training.naming import is_adapter

    expected, exact = (_half_base(tmp_path / kind, "single", kind)[1] for kind in ("bf16", "fp32"))
    for engine, (dtypes, losses) in run_distributed(_in_folder, 2, _half_base, timeout=400)[0].items():
        assert_near(losses, expected, apart(expected, exact))
        for key, dtype in dtypes.items():
            trained = is_adapter(key) or ".connector." in key
            assert dtype == (torch.float32 if trained else torch.bfloat16), (engine, key)


def _adapter_files(run_dir, name):
    config = make_config(run_dir, max_steps=3)
    config.engine.name = name
    config.adapter = AdapterConfig(kind="lora", rank=3, targets={"text": ["q_proj", "down_proj"]})
    model = TinyModel()
    torch.manual_seed(0)
    targets = apply_adapters(model, config.adapter)
    engine = make_engine(config)
    trainer = make_trainer(config, model, engine)
    trainer.train()
    tensors = full_parameters(engine)
    if engine.rank == 0:
        save_adapter(run_dir / "adapter", config.adapter, targets, tensors)
        fresh = TinyModel()
        apply_adapters(fresh, config.adapter)
        load_adapter(fresh, run_dir / "adapter")
        return {n: p.detach() for n, p in fresh.named_parameters() if "lora" in n}
    return None


def test_adapters_are_saved_whole_by_every_engine():
    results = run_distributed(_in_folder, 2, _adapter_files, timeout=400)[0]
    reference = results["ddp"]
    for engine, tensors in results.items():
        assert any(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n), engine
        for name, tensor in tensors.items():
            assert tensor.numel() > 0
            torch.testing.assert_close(tensor, reference[name], rtol=1e-4, atol=1e-6, msg=f"{engine} {name}")


def _held_out(run_dir, name):
    config = make_config(run_dir, max_steps=4, eval_every=2)
    config.engine.name = name
    model, engine = TinyModel(), make_engine(config)
    expected = parameter_table(model, config, engine.device)
    make_trainer(config, model, engine).train()
    assert parameter_table(model, config, engine.device) == expected, "sharded parameters count as whole ones"
    return [line["eval/loss"] for line in read_metrics(run_dir) if "eval/loss" in line]


def test_held_out_loss_is_the_same_under_every_engine(tmp_path):
    """Six packs on four ranks in evaluation: two ranks run an empty batch."""
    config = make_config(tmp_path, max_steps=4, eval_every=2)
    make_trainer(config, TinyModel()).train()
    expected = [line["eval/loss"] for line in read_metrics(tmp_path) if "eval/loss" in line]
    for engine, losses in run_distributed(_in_folder, 4, _held_out, timeout=400)[0].items():
        assert losses == pytest.approx(expected, rel=1e-5), engine


def _bad_step(run_dir, name):
    config = make_config(run_dir, max_steps=4)
    config.engine.name = name
    model, engine = TinyModel(), make_engine(config)
    trainer = make_trainer(config, model, engine)
    if engine.rank == 1:  # one rank alone meets the infinity
        model.norm.register_full_backward_hook(
            lambda m, grad_in, grad_out: tuple(g * float("inf") if trainer.step == 1 else g for g in grad_in)
        )
    trainer.train()
    return [line["skipped_steps"] for line in read_metrics(run_dir)], read_metrics(run_dir)[-1]["loss"]


def test_a_bad_step_of_one_rank_is_skipped_by_all():
    results = run_distributed(_in_folder, 2, _bad_step, timeout=400)[0]
    for engine, (skipped, loss) in results.items():
        assert skipped == [0, 1, 1, 1], engine
        assert loss == pytest.approx(results["ddp"][1], rel=1e-5), engine


def _outlier(run_dir, name):
    """Step 6 of eight has a gradient a thousand times too large on one rank; every part has rates of its own."""
    guard.WINDOW = 4
    config = make_config(run_dir, max_steps=8, skip_outliers=6.0)
    config.engine.name = name
    config.optimizer.betas, config.optimizer.eps = [0.8, 0.9], 1e-6
    config.optimizer.parts = {
        "vision": PartOptimizerConfig(lr=1e-3, weight_decay=0.5),
        "embeddings": PartOptimizerConfig(weight_decay=0.3, decay_all=True),
    }
    model, engine = TinyModel(), make_engine(config)
    trainer = make_trainer(config, model, engine)
    if engine.rank == engine.world_size - 1:
        model.norm.register_full_backward_hook(
            lambda m, grad_in, grad_out: tuple(g * 1e3 if trainer.step == 5 else g for g in grad_in)
        )
    trainer.train()
    lines = read_metrics(run_dir)
    return [line["skipped_steps"] for line in lines], [line["loss"] for line in lines]


@pytest.mark.slow
def test_an_outlier_is_skipped_and_rates_of_parts_hold_under_every_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", guard.WINDOW)  # put back afterwards
    skipped, losses = _outlier(tmp_path, "single")
    assert skipped == [0] * 5 + [1] * 3
    for engine, result in run_distributed(_in_folder, 2, _outlier, timeout=400)[0].items():
        assert result[0] == skipped, engine
        assert result[1] == pytest.approx(losses, rel=1e-5), engine


def _missing(run_dir, name):
    config = make_config(run_dir, max_steps=4)
    config.engine.name = name
    try:
        make_trainer(config, TinyModel(unused=True), make_engine(config)).train()
    except Exception as error:
        return str(error)


def test_a_parameter_without_gradient_is_named_under_every_engine():
    for engine, message in run_distributed(_in_folder, 2, _missing, timeout=400)[0].items():
        assert "connector.forgotten got no gradient" in message, engine


def _quantised(run_dir, name):
    for stop_after in (2, None):
        config, model, shape = build(Case(name, "idefics3", packs=7, steps=4, adapter="qlora"), str(run_dir))
        config.trainer.stop_after, config.trainer.eval_every = stop_after, 2
        make_trainer(config, model, make_engine(config), packs=7, shape=shape).train()
    return _curves(run_dir)


def _curves(run_dir):
    """Losses of training and of held-out data."""
    rows = read_metrics(run_dir)
    return [row["loss"] for row in rows if "loss" in row], [row["eval/loss"] for row in rows if "eval/loss" in row]


def test_qlora_trains_evaluates_and_resumes_under_every_engine(tmp_path, monkeypatch):
    trained, held_out = _quantised(tmp_path / "bf16", "single")
    assert len(trained) == 4
    assert len(held_out) == 2
    exact = dataclasses.replace(quantization._NF4, bnb_4bit_compute_dtype=torch.float32)
    monkeypatch.setattr(quantization, "_NF4", exact)
    errors = list(map(apart, (trained, held_out), _quantised(tmp_path / "fp32", "single")))
    monkeypatch.undo()
    for curves in run_distributed(_in_folder, 2, _quantised, timeout=400)[0].values():
        for curve, expected, error in zip(curves, (trained, held_out), errors, strict=True):
            assert_near(curve, expected, error)


def _scaled(run_dir, name, pauses=(3, None)):
    """A run in fp16 whose first updates overflow, interrupted and continued; its scales, skipped steps and losses."""
    for stop_after in pauses:
        config = make_config(run_dir, max_steps=7, precision="fp16", stop_after=stop_after, save_every=3)
        config.engine.name = name
        engine = make_engine(config)
        engine.scale.value.fill_(2.0**40)  # that of a checkpoint takes its place
        make_trainer(config, TinyModel(), engine).train()
        engine.barrier()
    rows = read_metrics(run_dir)
    return [row["loss_scale"] for row in rows], rows[-1]["skipped_steps"], [row["loss"] for row in rows]


def test_fp16_scales_its_losses_alike_under_every_engine(tmp_path):
    """With the scale of a checkpoint: steps before it overflow, and half the scale, under each of them."""
    scales, skipped, losses = _scaled(tmp_path, "single", pauses=(None,))
    assert scales == [2.0 ** (40 - n) for n in range(7)]
    assert skipped == 7
    for engine, found in run_distributed(_in_folder, 2, _scaled, timeout=400)[0].items():
        assert found[:2] == (scales, skipped), engine
        assert found[2] == pytest.approx(losses, rel=2e-3), engine


def _learned(run_dir, name):
    config = make_config(run_dir, max_steps=6, precision="fp16")
    config.engine.name = name
    make_trainer(config, TinyModel(), make_engine(config)).train()
    return [(row["loss_scale"], row["skipped_steps"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


def test_fp16_learns_the_same_under_every_engine(tmp_path):
    expected = _learned(tmp_path, "single")
    assert expected[-1][:2] == (precision.FIRST_SCALE, 0)
    for engine, found in run_distributed(_in_folder, 2, _learned, timeout=400)[0].items():
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[:2] == theirs[:2], engine
            assert ours[2:] == pytest.approx(theirs[2:], rel=2e-2), engine
