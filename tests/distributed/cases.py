"""Runs of a tiny model under an engine, to be compared with the run of one process."""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from m4train.config import AdapterConfig, BatchRampConfig, Config, FreezeConfig, FreezeRule
from m4train.models.resampler import ReluMLP
from m4train.training.adapters import apply_adapters
from m4train.training.engines import make_engine
from m4train.training.freezing import apply_freezing
from tests.helpers.training import (
    IDEFICS,
    IDEFICS2,
    IDEFICS3,
    Shape,
    TinyModel,
    make_config,
    make_trainer,
    read_metrics,
)

FLAGS = ("tied", "recompute", "frozen", "rows", "offload", "nodes", "weighted", "ramp")


@dataclass(frozen=True)
class Case:
    """One run. `packs` per step are dealt to ranks in turn, so that some rank has no image and some have fewer packs."""

    engine: str = "single"
    model: str = "tiny"  # tiny, idefics, idefics2, idefics3
    tied: bool = False
    packs: int = 6
    micro: int = 2
    recompute: bool = False
    frozen: bool = False
    adapter: str = "none"
    offload: bool = False
    nodes: bool = False
    rows: bool = False  # the rows of new tokens train, next to what the adapter or `frozen` leave
    weighted: bool = False  # loss weights per source
    ramp: bool = False  # two packs at first, three more every four steps
    steps: int = 20
    native: bool = False

    @property
    def name(self) -> str:
        flags = [key for key in FLAGS if getattr(self, key)]
        adapter = [] if self.adapter == "none" else [self.adapter]
        return "-".join([self.engine, self.model, f"p{self.packs}", f"m{self.micro}", *flags, *adapter])

    @property
    def reference(self) -> Case:
        """The same mathematics in one process, in one micro-batch."""
        return replace(self, engine="single", micro=self.packs, recompute=False, offload=False, nodes=False)


def _model(case: Case) -> tuple[nn.Module, Shape]:
    """A model with reproducible weights, and the shape of its packs."""
    if case.model == "tiny":
        return TinyModel(tied=case.tied), Shape()
    from m4train import models
    from tests.helpers.models import SHALLOW, perturb, tiny_idefics, tiny_idefics2, tiny_idefics3

    kind, config, values, shape = {
        "idefics": (models.IdeficsForVisionText2Text, models.IdeficsConfig, tiny_idefics, IDEFICS),
        "idefics2": (models.Idefics2ForConditionalGeneration, models.Idefics2Config, tiny_idefics2, IDEFICS2),
        "idefics3": (models.Idefics3ForConditionalGeneration, models.Idefics3Config, tiny_idefics3, IDEFICS3),
    }[case.model]
    model = kind(config.from_dict(values(tie_word_embeddings=case.tied, **SHALLOW[case.model])))
    perturb(model)  # off initial values, so that closed gates hide nothing
    for module in model.modules():
        if isinstance(module, ReluMLP):
            _make_smooth(module)
    return model, shape


def _make_smooth(layer: ReluMLP) -> None:
    """Puts GELU in the place of ReLU: a value within rounding of the kink moves the gradient norm of a step by 5e-4 in any two
    runs that add in another order, those of one process in other micro-batches included."""
    layer.forward = lambda x: layer.c_proj(torch.nn.functional.gelu(layer.fc(layer.ln(x))))  # type: ignore[method-assign]


def build(case: Case, run_dir: str) -> tuple[Config, nn.Module, Shape]:
    """The configuration, the model with its adapters and freezing applied, and the shape of its packs."""
    config = make_config(
        run_dir, max_steps=case.steps, micro_batch_size=case.micro, gradient_checkpointing=case.recompute, save_every=10
    )
    config.engine.name, config.engine.offload, config.engine.shard_within_node = case.engine, case.offload, case.nodes
    config.engine.checkpoint = "native" if case.native else "portable"
    # Some gradients are zero except for rounding (the bias of attention keys); Adam would make full steps of that noise.
    config.optimizer.lr, config.optimizer.eps = 1e-3, 1e-6
    model, shape = _model(case)
    if case.weighted:
        config.data.sources["web"].loss_weight, config.data.sources["chat"].loss_weight = 0.5, 3.0
    if case.ramp:
        config.trainer.batch_ramp = BatchRampConfig(start=2, increment=3, steps=4)
    joins = [FreezeRule(part=part, trainable=True) for part in ("connector", *(["new_tokens"] if case.rows else []))]
    if case.rows and case.model != "idefics":  # Idefics has rows of their own
        model.split_token_rows(60)
    if case.adapter != "none":
        config.adapter = AdapterConfig(kind=case.adapter, rank=4, targets={"text": ["q_proj"], "vision": ["q_proj"]})
        config.freeze = FreezeConfig(joins)
    elif case.rows:
        config.freeze = FreezeConfig([FreezeRule(), *joins])
    elif case.frozen:
        config.freeze = FreezeConfig([FreezeRule(part="vision"), FreezeRule(names=["*layers.0.*"], part="text")])
    else:
        config.freeze = FreezeConfig([FreezeRule(trainable=True)])
    torch.manual_seed(0)
    apply_adapters(model, config.adapter)
    apply_freezing(model, config.freeze)
    return config, model, shape


def run_case(case: Case, run_dir: str | None = None) -> list[dict[str, Any]]:
    """Trains and returns the metrics of every step; to be called on every rank."""
    if case.nodes:  # four processes act as two nodes of two
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    with tempfile.TemporaryDirectory() as scratch:
        config, model, shape = build(case, run_dir or scratch)
        engine = make_engine(config)
        config.run_dir = engine.broadcast(config.run_dir)
        make_trainer(config, model, engine, packs=case.packs, shape=shape).train()
        engine.barrier()
        metrics = read_metrics(config.run_dir)
        engine.barrier()
        engine.shutdown()
    return metrics


def run_cases(cases: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """Several cases in the same processes."""
    import torch.distributed as dist

    if any(case.engine != "single" for case in cases):
        dist.init_process_group("gloo")
    results = {}
    for case in cases:
        try:
            results[case.name] = run_case(case)
        except Exception as error:
            raise RuntimeError(f"case {case.name} failed") from error
    return results


FACTORS: dict[str, tuple[Any, ...]] = {
    "engine": ("ddp", "fsdp2", "zero1", "zero2", "zero3"),
    "world": (1, 2, 4),
    "model": ("tiny", "idefics", "idefics2", "idefics3"),
    "tied": (False, True),
    "packs": (6, 7),  # 7 does not divide by 2, neither by 4
    "micro": (1, 2, 8),
    "recompute": (False, True),
    "train": ("all", "frozen", "lora", "dora", "rows"),
    "offload": (False, True),
    "extra": ("", "weighted", "ramp"),
}


def _make(values: dict[str, Any]) -> tuple[int, Case]:
    train, model = values["train"], values["model"]
    case = Case(
        engine=values["engine"],
        model="idefics3" if train == "rows" and model == "tiny" else model,  # the tiny model cannot be split
        tied=values["tied"],
        packs=values["packs"],
        micro=values["micro"],
        recompute=values["recompute"],
        frozen=train == "frozen",
        rows=train == "rows",
        adapter={"dora": "dora", "lora": "lora", "rows": "lora"}.get(train, "none"),
        weighted=values["extra"] == "weighted",
        ramp=values["extra"] == "ramp",
        offload=values["offload"] and values["engine"] != "ddp",
    )
    return values["world"], case


def full() -> list[tuple[int, Case]]:
    """Every combination of the first factors, as (number of processes, case), with the others drawn for each."""
    every = ("engine", "world", "model", "train", "recompute")
    generator, cases = random.Random(1), []
    for row in itertools.product(*(FACTORS[key] for key in every)):
        drawn = {key: generator.choice(values) for key, values in FACTORS.items() if key not in every}
        cases.append(_make({**drawn, **dict(zip(every, row))}))
    return list(dict.fromkeys([*cases, *pairwise()]))


# Three at once that have broken other trainers: recomputation where frozen or adapted parameters are sharded.
TRIPLES = [
    (2, Case(engine, "idefics3", packs=7, recompute=True, adapter=adapter, frozen=adapter == "none"))
    for engine in ("fsdp2", "zero3")
    for adapter in ("none", "lora")
]


def pairwise() -> list[tuple[int, Case]]:
    """Few combinations in which every pair of values of every two factors occurs, found greedily."""
    keys = list(FACTORS)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(keys, 2) for x in FACTORS[a] for y in FACTORS[b]}
    generator, chosen = random.Random(0), []
    while missing:
        candidates = [{key: generator.choice(values) for key, values in FACTORS.items()} for _ in range(1000)]
        best = max(candidates, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        chosen.append(_make(best))
    return list(dict.fromkeys([*chosen, *TRIPLES]))


def _pairs(row: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(row.items(), 2))
