"""Models and processors out of a checkpoint alone, without the folders its run started from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from m4train.build import FAMILIES, equip
from m4train.config import Config
from m4train.training.checkpoint import TENSORS, read_tensors
from m4train.training.weights import weight_tensors

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels whenever peft is imported


def restore_processor(config: Config, folder: Path) -> Any:
    """The processor a checkpoint holds."""
    return FAMILIES[config.model.family].public("Processor").from_pretrained(folder)


def plain_model(config: Config, folder: Path) -> Any:
    """The model of a checkpoint without weights or adapters, on the meta device; rows of new tokens apart as it trained."""
    kind = FAMILIES[config.model.family].model
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(folder))
    path = folder / "generation_config.json"
    if path.is_file():
        model.generation_config = json.loads(path.read_text(encoding="utf-8"))
    if config.freeze.new_rows_from is not None:
        model.split_token_rows(config.freeze.new_rows_from)
    return model


def restore_model(config: Config, folder: Path) -> Any:
    """The model as it trained, adapters in place, with the weights of a checkpoint; fp32, on the CPU, for evaluation.

    Raises CheckpointError where the checkpoint lacks one of its tensors.
    """
    kind = FAMILIES[config.model.family].model
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(folder))
    fill(model)
    equip(model, config)
    read_tensors(folder / TENSORS, weight_tensors(model))
    return model.eval()


def fill(model: Any) -> None:
    """Gives every parameter of a model on the meta device memory, which stays untouched until something is written."""
    tied = model.tied_names()
    for name, parameter in list(model.named_parameters()):
        if name not in tied:
            owner, _, leaf = name.rpartition(".")
            fresh = torch.nn.Parameter(torch.zeros(parameter.shape), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), leaf, fresh)
    model.tie_weights()
