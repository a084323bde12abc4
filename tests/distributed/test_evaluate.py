"""`m4train evaluate` gives the same losses, answers and scores under every engine, samples dealt to ranks unevenly."""

import dataclasses
import json

import pyarrow.parquet
import pytest

from m4train.commands.evaluate import evaluate
from m4train.config import SourceConfig
from tests.helpers.checkpoints import saved_run
from tests.helpers.data import conversations, documents, write_shards
from tests.helpers.distributed import run_distributed
from tests.unit.evaluation.benchmarks.test_run import rows_of

ENGINES = ["ddp", "fsdp2", "zero1", "zero3"]


def _talks(count):
    """Conversations of which every third has no image and some give several references."""
    for number, (key, sample, images) in enumerate(conversations(count)):
        if number % 3 == 1:
            messages = [
                {"role": "user", "content": [{"text": "Say a number." * (1 + number)}]},
                {"role": "assistant", "content": [{"text": str(number)}]},
            ]
            sample, images = {"messages": messages, "references": [str(number), "seven"]}, {}
        yield key, sample, images


def _prepared(tmp_path, model):
    write_shards(tmp_path / "talks", _talks(5))
    write_shards(tmp_path / "pages", documents(3))
    config, _ = saved_run(tmp_path / "run", model=model)
    data = {name: SourceConfig(path=str(tmp_path / name / "*.tar")) for name in ("talks", "pages")}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=data, prepare=None))
    config.data.num_workers, config.trainer.micro_batch_size, config.data.sequence_length = 0, 1, 512
    config.evaluation.max_new_tokens, config.evaluation.batch_size = 5, 2
    config.evaluation.metric = "anls"
    config.resume = str(tmp_path / "run" / "checkpoints" / "step-000003")
    return config


def _evaluated(config, run_dir):
    """Results of every engine, one after the other in the same processes."""
    import torch.distributed as dist

    engines = [config.engine.name] if config.engine.name == "single" else ENGINES
    if engines != ["single"]:
        dist.init_process_group("gloo")
    results = {}
    for name in engines:
        config = dataclasses.replace(config, run_dir=f"{run_dir}/{name}")
        config.engine.name = name
        evaluate(config)
        if engines == ["single"] or dist.get_rank() == 0:
            results[name] = _read(f"{run_dir}/{name}")
    return results


def _read(folder):
    with open(f"{folder}/evaluation.json") as scores, open(f"{folder}/answers.jsonl") as lines:
        return json.load(scores), [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_idefics3", pytest.param("tiny_idefics2", marks=pytest.mark.full)])
def test_every_engine_gives_the_same_results(model, tmp_path):
    config = _prepared(tmp_path, model)
    scores, lines = _evaluated(config, tmp_path)["single"]
    assert scores["talks"]["count"] == 5
    assert scores["talks"]["loss_tokens"] > 0
    assert "count" not in scores["pages"]  # documents have a loss, and ask nothing
    assert lines[1]["references"] == ["1", "seven"]
    assert lines[0]["images"]
    assert not lines[1]["images"]
    config.engine.name = "ddp"
    for engine, (found, said) in run_distributed(_evaluated, 2, config, str(tmp_path), timeout=300)[0].items():
        assert said == lines, engine
        for source, result in scores.items():
            assert found[source].pop("loss") == pytest.approx(result["loss"], rel=1e-5), engine
            assert found[source] == {key: value for key, value in result.items() if key != "loss"}


def _trained(config, run_dir):
    """samples.jsonl and held-out losses of a run of two steps under every engine."""
    import torch.distributed as dist

    from m4train.commands.train import train

    engines = [config.engine.name] if config.engine.name == "single" else ["fsdp2", "zero3"]
    if engines != ["single"]:
        dist.init_process_group("gloo")
    results = {}
    for name in engines:
        config = dataclasses.replace(config, run_dir=f"{run_dir}/trained-{name}", resume="auto")
        config.engine.name = name
        train(config)
        with open(f"{config.run_dir}/samples.jsonl") as lines, open(f"{config.run_dir}/metrics.jsonl") as metrics:
            rows = [json.loads(line) for line in metrics]
            logged = [[row[key] for row in rows] for key in ("eval/loss", "eval/benchmarks")]
            results[name] = [json.loads(line) for line in lines], *logged
    return results


@pytest.mark.slow
def test_samples_are_answered_while_sharded_engines_train(tmp_path):
    config = _prepared(tmp_path, "tiny_idefics3")
    config.data.sources = {"talks": config.data.validation["talks"]}
    config.trainer.max_steps = config.schedule.warmup_steps = 2
    config.trainer.eval_every, config.trainer.log_every, config.evaluation.shown = 1, 1, 3
    (tmp_path / "benchmarks").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of("ai2d")), tmp_path / "benchmarks" / "ai2d.parquet")
    config.trainer.benchmarks, config.trainer.benchmark_data = {"ai2d": 3}, str(tmp_path / "benchmarks")
    samples, losses, scores = _trained(config, tmp_path)["single"]
    assert set(scores) <= {0.0, 1 / 3, 2 / 3, 1.0}
    assert [(line["step"], line["key"]) for line in samples] == [
        (step, f"chat{n:05d}") for step in (1, 2) for n in range(3)
    ]
    assert samples[0]["images"][0].startswith("data:image/png;base64,")
    config.engine.name = "fsdp2"
    for engine, (said, found, scored) in run_distributed(_trained, 2, config, str(tmp_path), timeout=300)[0].items():
        assert said == samples, engine
        assert scored == scores, engine
        assert found == pytest.approx(losses, rel=1e-5), engine
