"""Benchmarks on fixed subsets while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from m4train.config import Config
from m4train.evaluation.answers import decoding_of
from m4train.evaluation.benchmarks.asking import Setting, answered, chosen_numbers, share, to_ask
from m4train.evaluation.benchmarks.records import place_of
from m4train.evaluation.benchmarks.run import scored
from m4train.evaluation.benchmarks.spec import load_benchmark
from m4train.training.engines.base import Engine
from m4train.training.heartbeat import Heartbeat


def benchmark_scores(
    config: Config, engine: Engine, model: Any, processor: Any, heart: Heartbeat | None = None
) -> dict[str, float]:
    """`benchmark/NAME` of every entry of trainer.benchmarks, and `benchmarks`, their mean weighted by
    trainer.benchmark_weights; all ranks call it, share the questions, and get the same. Options are compared by likelihood."""
    scores: dict[str, float] = {}
    for name, limit in config.trainer.benchmarks.items():
        benchmark = replace(load_benchmark(name), scoring="likelihood")
        assert config.trainer.benchmark_data is not None
        place = place_of(Path(config.trainer.benchmark_data), benchmark.name)
        decoding, size = decoding_of(config, model, processor), config.evaluation.batch_size
        setting = Setting(model, processor, config.run_dir, decoding, engine, size, limit, heart=heart)
        mine = share(chosen_numbers(benchmark, place, setting), engine.rank, engine.world_size)
        with engine.autocast():
            lines = list(answered(benchmark, setting, to_ask(benchmark, place, setting, mine)))
        together = sorted((line for part in engine.gather(lines) for line in part), key=lambda line: line["number"])
        result = scored(benchmark, together, "") if engine.rank == 0 else None
        scores[name] = engine.broadcast(result.scores.value if result and result.scores else None)
    weights: Mapping[str, float] = {name: config.trainer.benchmark_weights.get(name, 1.0) for name in scores}
    mean = sum(weights[name] * score for name, score in scores.items()) / sum(weights.values())
    return {**{f"benchmark/{name}": score for name, score in scores.items()}, "benchmarks": mean}
