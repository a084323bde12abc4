"""What a file of `conf/benchmark/` holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from m4train.config.compose import resource_folder
from m4train.errors import ConfigError
from m4train.evaluation.metrics.registry import load_metric

SCORINGS = ("generation", "likelihood")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; the fields are the keys of its file."""

    name: str
    data: str  # the public release whose layout is read
    split: str
    expected: int  # samples of the split
    metric: str
    prompts: Mapping[str, str]  # family, or `default` -> prompt with {question}, {options}, {hint}
    files: str | None = None  # those of the release that hold the split; None: *SPLIT-*.parquet
    columns: Mapping[str, str] = field(default_factory=dict)  # our name of a field -> its name in the records
    about: tuple[str, ...] = ()  # further columns that the metric needs
    groups: tuple[str, ...] = ()  # columns by whose values scores are also reported
    prefix: str = ""  # how the assistant's turn begins, for questions with options or of all kinds
    max_new_tokens: int = 40
    stop_words: tuple[str, ...] = ("Question", "User", "<end_of_utterance>")
    tiles: int | None = None  # longest side of images in tiles of Idefics3 and SmolVLM; None: as the processor says
    submission: str | None = None  # name of the id in the file of the test server
    scoring: str = "generation"  # or likelihood, of the options

    @property
    def whole(self) -> Mapping[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def prompt(self, family: str) -> str:
        return self.prompts.get(family, self.prompts["default"])

    def prompt_hash(self, family: str) -> str:
        """Names what is asked and how: the prompt, the prefix, the limits and the scoring."""
        asked = [self.prompt(family), self.prefix, self.max_new_tokens, list(self.stop_words), self.tiles, self.scoring]
        return hashlib.blake2b(json.dumps(asked).encode(), digest_size=6).hexdigest()


def benchmark_names() -> list[str]:
    return sorted(path.stem for path in (resource_folder("conf") / "benchmark").glob("*.yaml"))


def load_benchmark(name: str) -> Benchmark:
    """The benchmark `name` of conf/benchmark, or of a file. Raises ConfigError."""
    path = Path(name) if name.endswith(".yaml") else resource_folder("conf") / "benchmark" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"benchmarks names {name!r}, but must name {', '.join(benchmark_names())}, or a YAML file.")
    found = OmegaConf.to_container(OmegaConf.load(path))
    known = {one.name for one in fields(Benchmark)}
    if not isinstance(found, dict) or set(found) - known:
        unknown = ", ".join(sorted(map(str, set(found) - known))) if isinstance(found, dict) else "no keys"
        raise ConfigError(f"{path} holds {unknown}, but a benchmark has {', '.join(sorted(known))}.")
    tuples = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
    try:
        benchmark = Benchmark(**{"name": path.stem, **found, **tuples})
    except TypeError as error:
        raise ConfigError(f"{path} lacks a key of a benchmark ({error}).") from None
    load_metric(benchmark.metric)
    if benchmark.scoring not in SCORINGS or "default" not in benchmark.prompts:
        raise ConfigError(f"{path} needs scoring {' or '.join(SCORINGS)}, and prompts.default.")
    return benchmark
