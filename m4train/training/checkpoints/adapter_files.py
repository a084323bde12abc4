"""Adapters as files that peft reads, and as a start for further training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from m4train.config import AdapterConfig
from m4train.config.adapter_start import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from m4train.errors import CheckpointError, ConfigError
from m4train.models.token_rows import apart_rows
from m4train.models.weight_files import save_tensors
from m4train.training.adapters import peft_config
from m4train.training.checkpoints.adapter_settings import check_settings
from m4train.training.checkpoints.save import TENSORS
from m4train.training.checkpoints.tensor_files import read_tensors
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_name, canonical_parameters, is_adapter
from m4train.training.tensors import PARAMETER

_FILE, _CONFIG_FILE = ADAPTER_FILE, ADAPTER_CONFIG_FILE
_MAGNITUDE = "lora_magnitude_vector"
_SECOND = re.compile(r"lora_(embedding_)?B\b")  # start at zero
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
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
    """The modules that train in full, by canonical name: what peft calls modules_to_save.

    A module counts if all its parameters train, or at least one that is its own; lists of modules count as their members,
    since peft wraps only what is called. Raises CheckpointError if such a module has an adapter too, or if peft would take
    another module for it.
    """
    names = [canonical_name(name) for name, _ in model.named_modules()]
    found: list[str] = []

    def visit(module: nn.Module, name: str) -> None:
        parameters = dict(module.named_parameters())
        own = [leaf for leaf, p in module.named_parameters(recurse=False) if p.requires_grad]
        adapted = any(is_adapter(n) for n in parameters)
        whole = bool(parameters) and not adapted and all(p.requires_grad for p in parameters.values())
        other = _taken_for(name, names)
        if (whole or own) and not (adapted or other or isinstance(module, _CONTAINERS) or not name):
            found.append(name)
            return
        if own:
            cause = "has an adapter inside it" if adapted else f"peft would take {other} for it"
            raise CheckpointError(f"{name} trained in full, but {cause}: merge the adapters instead.")
        for leaf, child in module.named_children():
            if leaf == "base_layer" and any(p.requires_grad for p in child.parameters()):
                raise CheckpointError(
                    f"{name} trained in full and has an adapter too, of which a folder of adapters can hold only one: merge "
                    "the adapters instead."
                )
            if not is_adapter(leaf):
                visit(child, canonical_name(f"{name}.{leaf}" if name else leaf))

    visit(model, "")
    return found


def _taken_for(name: str, names: Sequence[str]) -> str | None:
    """Another module that peft, which matches by how names end, would take for `name`."""
    return next((n for n in names if n.endswith(name) and n != name), None)


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    targets: list[str],
    tensors: Mapping[str, Tensor],
    whole: Sequence[str] = (),
    base: str | None = None,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained(base, folder)` reads.

    `targets` are the canonical names of the adapted modules, `whole` those of modules that trained in full alongside them
    (see `trained_whole`), `tensors` full (unsharded) parameters by canonical name, `base` the model they belong to.
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
    written.base_model_name_or_path = base
    written.save_pretrained(folder)
    save_tensors(folder / _FILE, state)


def load_adapter(model: TrainableModel, folder: Path) -> None:
    """Reads what `save_adapter` (or peft) wrote into a model that already has the same adapters.

    Modules that the file holds in full overwrite those of the model. Raises CheckpointError naming what is missing,
    unexpected, or of another shape.
    """
    if not (folder / _FILE).is_file() or not (folder / _CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds no adapter: {_FILE} and {_CONFIG_FILE} are needed.")
    live: dict[str, Tensor] = dict(canonical_parameters(model))
    stored = _read(folder, model)
    _drop_tied(model, stored, live)
    wanted = {name for name in live if is_adapter(name)} | {name for name in stored if not is_adapter(name)}
    if stored.keys() != wanted or not wanted <= live.keys():
        missing, unexpected = sorted(wanted - stored.keys())[:3], sorted(stored.keys() - live.keys())[:3]
        raise CheckpointError(
            f"The adapter in {folder} does not fit this model; only in the file: {unexpected}, only in the model: {missing}."
        )
    _copy({name: live[name] for name in stored}, stored, folder)


def _read(folder: Path, model: TrainableModel) -> dict[str, Tensor]:
    """The tensors of an adapter's file by canonical name, tables cut where the model has rows of new tokens apart."""
    stored = _stored(folder)
    every = {canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    return apart_rows(stored, every)


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


def _stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by canonical name."""
    try:
        return {_canonical_stored(name): tensor for name, tensor in load_file(folder / _FILE).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{folder / _FILE} cannot be read ({error}): copy the folder again.") from error


def _check_in_full(model: TrainableModel, folder: Path) -> None:
    """Raises CheckpointError if the file holds a module in full that does not train here, and differs: a run that starts from
    it would go on with values that none of its exports knows."""
    stored = _read(folder, model)
    frozen = {name: p for name, p in canonical_parameters(model).items() if not p.requires_grad and name in stored}
    for name, parameter in frozen.items():
        if parameter.shape != stored[name].shape or not torch.equal(parameter.cpu(), stored[name].to(parameter.dtype)):
            module = name.rpartition(".")[0]
            raise CheckpointError(
                f"The adapter in {folder} trained {module} in full, but this run leaves it frozen: add it to "
                "adapter.modules_to_save, or set adapter.from_config=true."
            )


def start_adapter(model: TrainableModel, folder: Path, config: AdapterConfig) -> None:
    """Begins with the adapter of a peft folder, or of a checkpoint of another run; what trains next to it is taken along.

    Raises ConfigError if `folder` is neither, CheckpointError if it holds another adapter than the model has.
    """
    if (folder / _FILE).is_file() or (folder / TENSORS).is_dir():
        check_settings(folder, config)
    if (folder / _FILE).is_file():
        _check_in_full(model, folder)
        load_adapter(model, folder)
    elif (folder / TENSORS).is_dir():
        from torch.distributed.checkpoint.api import CheckpointException

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
