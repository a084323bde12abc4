"""Models and processors out of a checkpoint alone, without the folders its run started from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4train.config import Config
from m4train.config.compose import stored_config
from m4train.errors import CheckpointError
from m4train.families import FAMILIES
from m4train.json_files import read_mapping
from m4train.models.token_rows import has_own_rows
from m4train.training.checkpoints.save import TENSORS
from m4train.training.checkpoints.state import Checkpoint
from m4train.training.checkpoints.tensor_files import read_tensors
from m4train.training.checkpoints.weights import CheckpointWeights, rows_apart
from m4train.training.equip import equip
from m4train.training.tensors import weight_tensors


def restore_processor(config: Config, folder: Path) -> Any:
    """The processor a checkpoint holds."""
    return FAMILIES[config.model.family].load("Processor").from_pretrained(folder)


def plain_model(config: Config, folder: Path) -> Any:
    """The model of a checkpoint without weights or adapters, on the meta device; rows of new tokens apart as it trained."""
    model = _on_meta(config, folder)
    first = _apart_from(model, folder)
    if first is not None:
        model.split_token_rows(first)
    return model


def _apart_from(model: Any, folder: Path) -> int | None:
    """The id from which tokens have rows apart in a checkpoint, and have not in the model that its config.json describes."""
    apart = 0 if has_own_rows(model.get_input_embeddings()) else rows_apart(folder)
    return model.config.token_rows - apart if apart else None


def restore_model(config: Config, folder: Path) -> Any:
    """The model as it trained, adapters in place, with the weights of a checkpoint; fp32, on the CPU, for evaluation.

    Raises CheckpointError if the checkpoint lacks one of its tensors.
    """
    model = _on_meta(config, folder)
    fill(model)
    equip(model, config, _apart_from(model, folder))
    read_tensors(folder / TENSORS, weight_tensors(model))
    return model.eval()


def hub_weights(
    config: Config, folder: Path, base: Callable[[str], Tensor] | None = None, adapted: bool = True
) -> tuple[Any, dict[str, torch.Size], Callable[[str], Tensor]]:
    """The model of a checkpoint as published folders hold it: on the meta device, the shape of each of its tensors, and what
    reads one by name, adapters merged (into `base`, if given; left out if not `adapted`) and rows of new tokens joined.

    Raises CheckpointError if the checkpoint's tensors are not those of its config.json.
    """
    model = plain_model(config, folder)
    weights = CheckpointWeights(folder, config.adapter, adapted)
    own = {name: p for name, p in model.named_parameters() if name not in model.tied_names()}
    if set(own) != set(weights.names):
        differing = sorted(set(own) ^ set(weights.names))
        raise CheckpointError(f"{folder} does not hold the model its config.json names: {differing[:5]}.")
    read = lambda name: weights.merged(name, own[name].shape, base).cpu()
    hub = model.hub_tensors(own)
    apart = {name: read(name) for name in own if name not in hub}  # a few rows, which belong at the end of others
    shapes = {name: tensor.shape for name, tensor in hub.items()}
    return model, shapes, lambda name: model.hub_tensors({**apart, name: read(name)})[name]


def merged_model(checkpoint: Checkpoint) -> Any:
    """A plain fp32 model to start a run from: the weights of another run's checkpoint, what its adapters learned merged."""
    config = stored_config(checkpoint.state["config"], checkpoint.folder)
    _, shapes, read = hub_weights(config, checkpoint.folder)
    model = _on_meta(config, checkpoint.folder)
    fill(model)
    with torch.no_grad():
        for name in shapes:
            model.get_parameter(name).copy_(read(name))
    return model.eval()


def _on_meta(config: Config, folder: Path) -> Any:
    """The model a folder describes, without weights."""
    kind = FAMILIES[config.model.family].model_class
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(folder))
    path = folder / "generation_config.json"
    model.generation_config = read_mapping(path) if path.is_file() else {}
    return model


def fill(model: Any) -> None:
    """Gives every parameter of a model on the meta device memory, which stays untouched until something is written."""
    tied = model.tied_names()
    for name, parameter in list(model.named_parameters()):
        if name not in tied:
            owner, _, leaf = name.rpartition(".")
            fresh = torch.nn.Parameter(torch.zeros(parameter.shape), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), leaf, fresh)
    model.tie_weights()
