"""Adapters as files that peft reads, and as a start for further training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from m4train.config import AdapterConfig
from m4train.errors import CheckpointError, ConfigError
from m4train.training.adapters import peft_config
from m4train.training.checkpoints.save import TENSORS, read_tensors
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_name, canonical_parameters, is_adapter
from m4train.training.tensors import PARAMETER

_FILE, _CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_MAGNITUDE = "lora_magnitude_vector"
_SECOND = re.compile(r"lora_(embedding_)?B\b")  # start at zero
_PREFIX = "base_model.model."  # what peft puts before every name in its files


def adapter_state(tensors: Mapping[str, Tensor], whole: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of adapters and of the modules `whole` among canonical names, under the names peft gives them in its files."""
    modules = tuple(f"{name}." for name in whole)
    kept = {name: t for name, t in tensors.items() if is_adapter(name) or (modules and name.startswith(modules))}
    return {_PREFIX + _peft_name(name): tensor for name, tensor in kept.items()}


def _peft_name(name: str) -> str:
    """peft's files call the magnitude of DoRA by the name of the module that holds it."""
    return name.removesuffix(".weight") if name.endswith(_MAGNITUDE + ".weight") else name


def _canonical_stored(name: str) -> str:
    name = canonical_name(name.removeprefix(_PREFIX))
    return f"{name}.weight" if name.endswith(_MAGNITUDE) else name


def trained_whole(model: TrainableModel) -> list[str]:
    """The largest modules of which every parameter trains, by canonical name: what peft calls modules_to_save.

    Raises CheckpointError for a parameter that trains in full but shares its module with others that do not.
    """
    found: list[str] = []

    def visit(module: nn.Module, name: str) -> None:
        parameters = dict(module.named_parameters())
        if name and parameters and all(p.requires_grad and not is_adapter(n) for n, p in parameters.items()):
            found.append(canonical_name(name))
            return
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not is_adapter(f"{name}.{leaf}"):
                raise CheckpointError(
                    f"{name}.{leaf} trains in full, but not all of {name or 'the model'} does; a folder of adapters holds "
                    "whole modules: merge the adapters instead."
                )
        for leaf, child in module.named_children():
            if not is_adapter(leaf):
                visit(child, f"{name}.{leaf}" if name else leaf)

    visit(model, "")
    names = [canonical_name(name) for name, _ in model.named_modules()]
    for name in found:
        other = next((n for n in names if n.endswith(name) and n != name and not n.startswith(f"{name}.")), None)
        if other is not None:  # peft matches by how names end
            raise CheckpointError(
                f"{name} trained in full, but peft would take {other} for it: merge the adapters instead."
            )
    return found


def save_adapter(
    folder: Path, config: AdapterConfig, targets: list[str], tensors: Mapping[str, Tensor], whole: Sequence[str] = ()
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained(base, folder)` reads.

    `targets` are the canonical names of the adapted modules, `whole` those of modules that trained in full next to them (see
    `trained_whole`), `tensors` full (unsharded) parameters by canonical name.
    Raises CheckpointError if there is no adapter among them, or one of the tensors is empty or not finite.
    """
    kept = adapter_state(tensors, whole)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
    if not any(is_adapter(name) for name in state):
        raise CheckpointError("There is no adapter to save: no tensor of the model belongs to one.")
    for name, tensor in state.items():
        if tensor.numel() == 0 or not torch.isfinite(tensor).all():
            raise CheckpointError(f"Adapter tensor {name} is empty or not finite; the adapter was not saved.")
    if not any(tensor.any() for name, tensor in state.items() if _SECOND.search(name)):
        raise CheckpointError("The second matrices of the adapter are all zero: it would change nothing; train first.")
    folder.mkdir(parents=True, exist_ok=True)
    written = peft_config(config, targets)
    written.modules_to_save = list(whole) or None
    written.inference_mode = True
    written.save_pretrained(folder)
    save_file(state, folder / _FILE, metadata={"format": "pt"})


def load_adapter(model: TrainableModel, folder: Path) -> None:
    """Reads what `save_adapter` (or peft) wrote into a model that already has the same adapters.

    Modules that the file holds in full overwrite those of the model. Raises CheckpointError naming what is missing,
    unexpected, or of another shape.
    """
    if not (folder / _FILE).is_file() or not (folder / _CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds no adapter: {_FILE} and {_CONFIG_FILE} are needed.")
    stored = {_canonical_stored(name): t for name, t in load_file(folder / _FILE).items()}
    live: dict[str, Tensor] = dict(canonical_parameters(model))
    _drop_tied(model, stored, live)
    wanted = {name for name in live if is_adapter(name)} | {name for name in stored if not is_adapter(name)}
    if stored.keys() != wanted or not wanted <= live.keys():
        missing, unexpected = sorted(wanted - stored.keys())[:3], sorted(stored.keys() - live.keys())[:3]
        raise CheckpointError(
            f"The adapter in {folder} does not fit this model; only in the file: {unexpected}, only in the model: {missing}."
        )
    _copy({name: live[name] for name in stored}, stored, folder)


def _drop_tied(model: TrainableModel, stored: dict[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Of tensors that are one in the model, keeps the first. Raises CheckpointError if the file's copies differ."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = canonical_name(name)
        if other in live or other not in stored:
            continue
        first = next(key for key, tensor in live.items() if tensor is parameter)
        if not torch.equal(stored.setdefault(first, stored[other]), stored[other]):
            raise CheckpointError(
                f"{other} and {first} are one tensor in this model, but differ in the adapter's file."
            )
        del stored[other]


def start_adapter(model: TrainableModel, folder: Path) -> None:
    """Begins with the adapter of a peft folder, or of a checkpoint of another run; what trains next to it is taken along.

    Raises ConfigError if `folder` is neither, CheckpointError if it holds another adapter than the model has.
    """
    if (folder / _FILE).is_file():
        load_adapter(model, folder)
    elif (folder / TENSORS).is_dir():
        live = {name: p for name, p in canonical_parameters(model).items() if p.requires_grad}
        fresh = {f"{PARAMETER}{name}": torch.empty_like(p) for name, p in live.items()}
        try:
            read_tensors(folder / TENSORS, fresh)
        except (CheckpointException, RuntimeError, ValueError) as error:
            cause = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"Checkpoint {folder} lacks what trains in this run: {cause}") from error
        _copy(live, {name: fresh[f"{PARAMETER}{name}"] for name in live}, folder)
    else:
        raise ConfigError(
            f"adapter.start_from is {folder}, but must be a folder with {_FILE}, or a checkpoint such as "
            "RUN/checkpoints/step-000100."
        )


def _copy(live: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in live.items():
            if parameter.shape != stored[name].shape:
                raise CheckpointError(
                    f"Adapter tensor {name} is {tuple(stored[name].shape)} in {folder} but {tuple(parameter.shape)} here; "
                    "set adapter.rank to the stored one."
                )
            parameter.copy_(stored[name])
