"""`m4train estimate`: whether a configuration fits a GPU, and how long it takes, before anything is downloaded or queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from m4train import build
from m4train.commands.inspect import show
from m4train.config import Config
from m4train.errors import ConfigError
from m4train.estimation.needs import Estimate, Subject, estimate
from m4train.estimation.published import ARCHITECTURES
from m4train.estimation.tables import as_report, estimate_tables
from m4train.families import FAMILIES
from m4train.gpus import GPUS
from m4train.hub import CONFIG_FILES, model_folder
from m4train.json_files import read_mapping


def run(config: Config, gpu: str | None, ranks: int | None, mfu: str | None, as_json: bool) -> int:
    """Prints the estimate of a configuration; returns 0 if it fits, 1 if it does not."""
    found = estimated(config, gpu, ranks, _share(mfu))
    show(as_report(found), estimate_tables(found), as_json)
    return 0 if found.fits else 1


def estimated(config: Config, gpu: str | None, ranks: int | None, mfu: float | None) -> Estimate:
    """The estimate of a configuration. Raises ConfigError for a GPU that is not known, and as `estimate` does."""
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu} is not known: choose {', '.join(GPUS)}.")
    if config.trainer.precision == "auto":
        config.trainer.precision = "fp32" if gpu is None else "fp16" if gpu in ("t4", "v100") else "bf16"
    architecture, stored = architecture_of(config)
    processes = ranks or config.launch.processes or 1
    return estimate(Subject(config, architecture, stored, processes, gpu), mfu)


def _share(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--mfu {given} is not a share of the peak between 0 and 1, such as --mfu 0.4.")
    return share


def architecture_of(config: Config) -> tuple[Any, torch.dtype | None]:
    """The configuration of the model, and the dtype its weights are stored in (None: fp32): of published models without a
    download, of other hub models from their config.json alone."""
    model, kind = config.model, FAMILIES[config.model.family].load("Config")
    if model.pretrained in ARCHITECTURES:
        return kind.from_dict({**ARCHITECTURES[model.pretrained], "model_type": model.family}), torch.bfloat16
    if model.pretrained is not None:
        folder = model_folder(build.start_folder(model.pretrained), CONFIG_FILES)
        found = kind.from_pretrained(folder)
        return found, _stored(Path(folder))
    return build.build_architecture(config, build.build_processor(config)), None


def _stored(folder: Path) -> torch.dtype | None:
    """What config.json says of the dtype of the weights."""
    said = read_mapping(folder / "config.json")
    name = said.get("dtype") or said.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name))
