"""Runs that were trained in no time: a model with random weights, saved as a checkpoint of its run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from m4train import AutoModelForImageTextToText, AutoProcessor, build
from m4train.commands.export import _probe
from m4train.commands.train import describe_model
from m4train.config import Config
from m4train.config.compose import load_config, save_config
from m4train.run_files import CHECKPOINTS
from m4train.training.checkpoints.changes import config_dict
from m4train.training.checkpoints.save import save_checkpoint, versions
from m4train.training.engines.single import SingleEngine
from m4train.training.naming import canonical_parameters
from m4train.training.parts_table import parameter_table
from tests.helpers.processing import tokenizer_folder
from tests.helpers.rounding import TIMES, widened


def saved_run(
    run_dir: Path, *overrides: str, model: str = "tiny_idefics3", step: int = 3, moved: str = "all"
) -> tuple[Config, Any]:
    """The configuration of a run of `model` (fp32) and its live model, whose checkpoint lies in `run_dir`.

    Every parameter (if `moved` is "trained": every one that trains) is off its initial value, so that no adapter is without
    effect.
    """
    config = load_config(
        [
            "experiment=digits_pretrain",
            f"model={model}",
            f"model.tokenizer={tokenizer_folder()}",
            f"run_dir={run_dir}",
            "logging=none",
            *overrides,
        ]
    )
    processor = build.build_processor(config)
    live: Any = build.build_model(config, processor)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in canonical_parameters(live).values():
            if parameter.is_floating_point() and (moved == "all" or parameter.requires_grad):
                parameter.add_(0.02 * torch.randn_like(parameter))
    save(config, live, processor, step)
    return config, live


@torch.no_grad()
def export_rounding(folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """How far two right computations in `dtype` of the logits of an exported model may be apart, on what export compares."""
    model, inputs = AutoModelForImageTextToText.from_pretrained(folder), _probe(AutoProcessor.from_pretrained(folder))
    exact = widened(model)(**widened(dict(inputs))).logits
    return TIMES * float((model.to(dtype)(**inputs).logits - exact).abs().max())


def save(config: Config, live: Any, processor: Any, step: int = 3) -> Path:
    """Writes what `m4train train` leaves of a run: its configuration, its table of parts, and one checkpoint."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    table = [dataclasses.asdict(row) for row in parameter_table(live, config, torch.device("cpu"))]
    (run_dir / "parameters.json").write_text(json.dumps(table))
    engine = SingleEngine(config, "cpu")
    engine.prepare(live)
    state = {"step": step, "plan": {}, "config": config_dict(config), "callbacks": {}, "versions": versions()}
    return save_checkpoint(
        run_dir / CHECKPOINTS, engine, state, 2, save_extra=lambda folder: describe_model(folder, live, processor)
    )
