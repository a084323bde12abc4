"""Benchmarks while a model trains: the metrics, their weights, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from m4train.commands.train import train
from m4train.config import SourceConfig
from m4train.config.compose import load_config
from m4train.errors import ConfigError
from m4train.inspection.stage_charts import stage_charts
from m4train.run_files import read_run
from tests.helpers.checkpoints import saved_run
from tests.helpers.data import conversations, write_shards
from tests.helpers.training import read_metrics
from tests.unit.evaluation.benchmarks.test_run import rows_of


@pytest.mark.slow
def test_benchmarks_are_scored_at_every_evaluation(tmp_path: Path) -> None:
    for name in ("ai2d", "docvqa"):
        (tmp_path / "data" / name).mkdir(parents=True)
        pa.parquet.write_table(pa.Table.from_pylist(rows_of(name)), tmp_path / "data" / name / "part.parquet")
    write_shards(tmp_path / "talks", conversations(4))
    config, _ = saved_run(tmp_path / "saved")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"), resume="auto")
    config.trainer.max_steps = config.schedule.warmup_steps = 2
    config.trainer.eval_every = config.trainer.log_every = config.trainer.micro_batch_size = 1
    config.data.sequence_length = 512
    talks = {"talks": SourceConfig(path=str(tmp_path / "talks" / "*.tar"))}
    config.data.sources, config.data.validation, config.data.prepare = dict(talks), dict(talks), None
    config.data.num_workers, config.evaluation.shown, config.evaluation.batch_size = 0, 0, 2
    config.trainer.benchmarks, config.trainer.benchmark_data = {"ai2d": 3, "docvqa": 2}, str(tmp_path / "data")
    config.trainer.benchmark_weights = {"ai2d": 3.0}
    config.trainer.best.metric, config.trainer.best.mode = "eval/benchmarks", "max"
    config.trainer.save_every = 1
    assert train(config) == 0
    for row in read_metrics(tmp_path / "run"):
        ai2d, docvqa = row["eval/benchmark/ai2d"], row["eval/benchmark/docvqa"]
        assert ai2d in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
        assert row["eval/benchmarks"] == pytest.approx((3 * ai2d + docvqa) / 4)
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best["metric"] == "eval/benchmarks"
    assert best["value"] == max(row["eval/benchmarks"] for row in read_metrics(tmp_path / "run"))
    line = {"step": 2, "checkpoint": "step-000002", "benchmark": "docvqa", "count": 77, "value": 0.25}
    (tmp_path / "run" / "evaluation.jsonl").write_text(json.dumps(line) + "\n")  # as a job that followed leaves it
    (chart,) = (each["svg"] for each in stage_charts([read_run(tmp_path / "run")]) if each["title"] == "benchmarks")
    assert all(name in chart for name in ("ai2d", "docvqa", "weighted", "docvqa, 77 samples"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.benchmarks={ai2d: 3}"], "needs trainer.eval_every, and trainer.benchmark_data"),
        (["trainer.benchmark_data=x"], "trainer.benchmarks names none"),
        (["trainer.benchmarks={ai2d: 0}", "trainer.benchmark_data=x"], "trainer.benchmarks.ai2d is 0"),
        (["trainer.benchmark_weights={ai2d: 1}"], "it must name one of trainer.benchmarks"),
    ],
)
def test_what_cannot_act_is_refused(overrides: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(["experiment=digits_sft", "trainer.eval_every=0", *overrides])
