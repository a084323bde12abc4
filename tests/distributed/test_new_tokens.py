"""Tokens added to a pretrained model train under every kind of engine, next to LoRA and QLoRA, as in one process."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch

from m4train.config import FreezeConfig, FreezeRule
from m4train.training import quantization
from m4train.training.adapters import apply_adapters
from m4train.training.engines import make_engine
from m4train.training.freezing import apply_freezing
from tests.distributed.cases import Case, _model, build
from tests.helpers.distributed import run_distributed
from tests.helpers.rounding import apart, assert_near
from tests.helpers.training import full_parameters, make_trainer, read_metrics

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "fsdp2", "zero3")
KINDS = ("lora", "qlora")
ADDED = 3


def _grown(run_dir, name, kind):
    """The losses of a run whose model got three rows, and what these rows have become, in embeddings and head."""
    case = Case(name, "idefics3", packs=7, steps=3, adapter=kind)
    config, _, shape = build(case, str(run_dir))
    model, _ = _model(case)
    first = model.config.token_rows
    model.grow_token_rows(first, first + ADDED, {first: [5, 6]})
    model.split_token_rows(first)
    config.freeze = FreezeConfig([*config.freeze.rules, FreezeRule(part="new_tokens", trainable=True)])
    torch.manual_seed(0)
    apply_adapters(model, config.adapter)
    apply_freezing(model, config.freeze)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "additional" in n}
    engine = make_engine(config)
    shape = dataclasses.replace(shape, vocabulary=first + ADDED)
    make_trainer(config, model, engine, packs=7, shape=shape).train()
    after = {n: t.detach().clone() for n, t in full_parameters(engine).items() if "additional" in n}
    engine.barrier()
    return [row["loss"] for row in read_metrics(run_dir)], before, after


def _every_engine():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    return {(name, kind): _grown(Path(box[0]) / name / kind, name, kind) for name in ENGINES for kind in KINDS}


def test_added_tokens_train_as_in_one_process(tmp_path, monkeypatch):
    expected = {kind: _grown(tmp_path / kind, "single", kind) for kind in KINDS}
    exact = dataclasses.replace(quantization._NF4, bnb_4bit_compute_dtype=torch.float32)
    monkeypatch.setattr(quantization, "_NF4", exact)
    rounded = _grown(tmp_path / "fp32", "single", "qlora")
    monkeypatch.undo()
    for (name, kind), (losses, before, after) in run_distributed(_every_engine, 2, timeout=600)[0].items():
        trained, _, rows = expected[kind]
        assert len(rows) == 2, name
        for key, table in rows.items():
            assert after[key].shape == table.shape == before[key].shape == (ADDED, table.shape[1]), (name, key)
            assert (after[key].float() != before[key].float()).any(1).all(), (name, kind, key)  # every row learns
            if kind == "lora":
                torch.testing.assert_close(after[key].float(), table.float(), rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
        if kind == "lora":
            assert losses == pytest.approx(trained, rel=1e-5), name
        else:
            assert_near(losses, trained, apart(trained, rounded[0]))
