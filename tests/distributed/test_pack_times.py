"""Ranks that time packs agree on what they cost, train the same steps as one process, and go on as they began."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m4train.commands.train import trained
from m4train.config.compose import load_config
from m4train.training.checkpoints.state import open_checkpoint
from tests.helpers.data import documents, write_shards
from tests.helpers.distributed import run_distributed
from tests.helpers.processing import tokenizer_folder
from tests.helpers.training import read_metrics

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(run_dir: Path, data: Path, engine: str, measured: bool) -> None:
    parts = ("text_config", "vision_config")
    small = [f"model.architecture.{part}.{key}={value}" for part in parts for key, value in SMALL.items()]
    overrides = ["experiment=digits_pretrain", f"engine={engine}", f"run_dir={run_dir}", *small, "logging=none"]
    overrides += ["model.architecture.text_config.num_key_value_heads=1", f"model.tokenizer={tokenizer_folder()}"]
    overrides += [
        "data.prepare=null",
        f"data.sources={{documents: {{path: '{data}/*.tar'}}}}",
        "~data.validation.documents",
    ]
    overrides += ["data.sequence_length=512", "data.images_per_pack=24", "data.packing_pool=6", "data.num_workers=0"]
    overrides += [
        "trainer.global_batch_size=6",
        "trainer.micro_batch_size=1",
        "trainer.max_steps=4",
        "trainer.log_every=1",
    ]
    overrides += ["trainer.eval_every=0", "trainer.save_every=2", "schedule.warmup_steps=0"]
    trained(load_config([*overrides, f"data.cost.measured={str(measured).lower()}", "threads=1"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=pytest.mark.full) for name in ("fsdp2", "zero2", "zero3"))]
)
def test_a_run_that_shares_by_times(engine: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "data", documents(80))
    run(tmp_path / "one", tmp_path / "data", "single", False)
    run_distributed(run, 2, tmp_path / "two", tmp_path / "data", engine, True)
    expected, found = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["data_hash"] for line in found] == [line["data_hash"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    kept = [open_checkpoint(tmp_path / "two" / "checkpoints" / f"step-{step:06d}").state for step in (2, 4)]
    assert kept[0]["callbacks"]["PackTimes"] == kept[1]["callbacks"]["PackTimes"]
    assert kept[0]["callbacks"]["PackTimes"].keys() == {"cpu"}

    again = tmp_path / "again" / "checkpoints"  # the same run from its second step on
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-000002", again / "step-000002")
    run_distributed(run, 2, tmp_path / "again", tmp_path / "data", engine, True)
    assert [line["loss"] for line in read_metrics(tmp_path / "again")] == [line["loss"] for line in found[2:]]
