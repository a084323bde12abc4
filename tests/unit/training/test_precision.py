"""fp16 with a loss scale learns as fp32 does, keeps its scale, and auto is decided once for a run."""

import pytest
import torch

from m4train.config import AdapterConfig, Config, FreezeConfig, FreezeRule
from m4train.errors import ConfigError
from m4train.families import FAMILIES
from m4train.training import precision
from m4train.training.engines import make_engine
from m4train.training.engines.single import SingleEngine
from m4train.training.equip import equip
from m4train.training.precision import FIRST_SCALE, GROWTH_STEPS, LossScale, machine_precision, resolve_precision
from m4train.training.quantization import is_quantized
from tests.helpers.models import packed_batch, tiny_idefics3
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics

CPU = torch.device("cpu")


def test_the_scale_halves_on_overflow_and_doubles_after_a_while():
    scale = LossScale("fp16", CPU)
    no, yes = torch.tensor(False), torch.tensor(True)
    for _ in range(GROWTH_STEPS - 1):
        scale.after(no)
    assert scale.value == FIRST_SCALE
    scale.after(no)
    assert scale.value == 2 * FIRST_SCALE
    scale.after(no)
    scale.after(yes)
    assert scale.value == FIRST_SCALE
    for _ in range(40):
        scale.after(yes)
    assert scale.value == 1
    assert LossScale("bf16", CPU).scaled(torch.tensor(3.0)) == 3
    assert LossScale("bf16", CPU).tensors() == {}


def test_fp16_learns_as_fp32_does_and_goes_on_with_its_scale(tmp_path):
    curves = {}
    for name in ("fp32", "fp16"):
        make_trainer(make_config(tmp_path / name, max_steps=8, precision=name), TinyModel()).train()
        curves[name] = read_metrics(tmp_path / name)
    assert "loss_scale" not in curves["fp32"][0]
    assert {row["loss_scale"] for row in curves["fp16"]} == {FIRST_SCALE}
    for one, other in zip(curves["fp16"], curves["fp32"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)


def test_an_overflow_is_skipped_and_a_resumed_run_keeps_the_lower_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**40)
    whole = make_config(tmp_path / "whole", max_steps=6, precision="fp16", save_every=3)
    make_trainer(whole, TinyModel()).train()
    rows = read_metrics(tmp_path / "whole")
    assert rows[-1]["skipped_steps"] > 0
    assert rows[-1]["loss_scale"] < rows[0]["loss_scale"]
    for steps in (3, None):
        parts = make_config(tmp_path / "parts", max_steps=6, precision="fp16", save_every=3, stop_after=steps)
        make_trainer(parts, TinyModel()).train()
    again = read_metrics(tmp_path / "parts")
    assert [row["loss_scale"] for row in again] == [row["loss_scale"] for row in rows]
    assert again[-1]["loss"] == rows[-1]["loss"]


@pytest.mark.parametrize(
    ("cuda", "native", "flags", "expected"),
    [
        (True, True, "", "bf16"),
        (True, False, "avx512_bf16", "fp16"),
        (False, False, "sse avx512_bf16", "bf16"),
        (False, False, "fp asimd bf16", "bf16"),
        (False, False, "avx2 avx512f", "fp32"),
    ],
)
def test_auto_is_what_the_hardware_has(cuda, native, flags, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset(flags.split()))
    assert machine_precision() == expected


def test_a_run_goes_on_with_the_precision_it_began_with(tmp_path, monkeypatch):
    assert Config().trainer.precision == "auto"
    monkeypatch.setattr(precision, "machine_precision", lambda: "fp16")
    config = make_config(tmp_path, max_steps=2, precision="auto", save_every=2)
    engine = make_engine(config)
    assert config.trainer.precision == "fp16"
    make_trainer(config, TinyModel(), engine).train()
    monkeypatch.setattr(precision, "machine_precision", lambda: "bf16")
    again = make_config(tmp_path, max_steps=4, precision="auto")
    resolve_precision(again)
    assert again.trainer.precision == "fp16"
    elsewhere = make_config(tmp_path / "other", precision="auto")
    resolve_precision(elsewhere)
    assert elsewhere.trainer.precision == "bf16"


def test_frozen_weights_in_bf16_need_it(tmp_path, monkeypatch):
    for machine, expected in (("fp32", "bf16"), ("bf16", "bf16"), ("fp16", None)):
        monkeypatch.setattr(precision, "machine_precision", lambda machine=machine: machine)
        config = make_config(tmp_path / machine, precision="auto")
        config.freeze = FreezeConfig(frozen_dtype="bf16")
        if expected is None:
            with pytest.raises(ConfigError, match=r"freeze\.frozen_dtype"):
                resolve_precision(config)
        else:
            resolve_precision(config)
            assert config.trainer.precision == expected


def test_a_run_may_go_on_in_fp16(tmp_path):
    """trainer.precision holds from the next step on; the checkpoint before it has no scale."""
    make_trainer(make_config(tmp_path, max_steps=4, stop_after=2), TinyModel()).train()
    make_trainer(make_config(tmp_path, max_steps=4, precision="fp16"), TinyModel()).train()
    make_trainer(make_config(tmp_path, max_steps=6, precision="fp32"), TinyModel()).train()
    rows = read_metrics(tmp_path)
    assert [row.get("loss_scale") for row in rows] == [None, None, FIRST_SCALE, FIRST_SCALE, None, None]


def test_fp16_computes_with_frozen_weights_that_were_stored_in_bf16():
    config = Config()
    config.trainer.precision = "fp16"
    config.freeze.rules = [FreezeRule(trainable=False), FreezeRule(part="text", trainable=True)]
    family = FAMILIES["idefics3"]
    model = family.model_class(family.load("Config").from_dict(tiny_idefics3())).to(torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    equip(model, config)
    engine = SingleEngine(config, "cpu")
    engine.prepare(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}
    output = engine.forward(packed_batch([torch.arange(3, 12), torch.arange(20, 25)]))
    engine.backward(output.loss / 10, True)
    assert engine.update(1.0, 1.0).total > 0


def test_qlora_learns_in_fp16_as_in_fp32():
    """The layers of 4 bits compute in fp16 too, their adapters stay in fp32, and the scale is in the metrics."""
    family, losses = FAMILIES["idefics3"], {}
    for name in ("fp32", "fp16"):
        config = Config()
        config.trainer.precision = name
        config.adapter = AdapterConfig(kind="qlora", rank=4, targets={"text": ["q_proj"]})
        values = tiny_idefics3()
        values["text_config"] |= {"hidden_size": 64, "intermediate_size": 128}
        model = family.model_class(family.load("Config").from_dict(values))
        model.init_weights(torch.Generator().manual_seed(0))
        equip(model, config)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        engine = SingleEngine(config, "cpu")
        engine.prepare(model)
        losses[name] = []
        for _ in range(4):
            output = engine.forward(packed_batch([torch.arange(3, 12), torch.arange(20, 25)]))
            engine.backward(output.loss / 10, True)
            update = engine.update(1e-2, 1.0)
            losses[name].append(output.loss.item())
            assert update.total > 0
        if name == "fp16":
            assert {m.compute_dtype for m in model.modules() if is_quantized(m)} == {torch.float16}
    assert losses["fp16"][-1] < losses["fp16"][0]
    torch.testing.assert_close(torch.tensor(losses["fp16"]), torch.tensor(losses["fp32"]), rtol=2e-2, atol=0)
