"""The optimizer: parameter groups by part, and an update that can be skipped on the device."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m4train.config import OptimizerConfig, optimizer_kind
from m4train.config.packages import need
from m4train.errors import ConfigError
from m4train.parts import EMBEDDINGS, LM_HEAD, NEW_TOKENS
from m4train.training.naming import canonical_name, is_adapter, part_of


def peak_rate(config: OptimizerConfig, part: str) -> float:
    """The peak learning rate of a part of the model."""
    own = config.parts.get(part)
    return config.lr if own is None or own.lr is None else own.lr


def undecayed_names(model: nn.Module) -> set[str]:
    """Canonical names that weight decay leaves alone: norms, biases, gates and embeddings."""
    names = set()
    for prefix, module in model.named_modules():
        whole = isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm")
        for leaf, parameter in module.named_parameters(recurse=False):
            name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor
            vector = math.prod(shape) == max(shape, default=1)  # biases, and gates such as (1, 1, H)
            if is_adapter(name):
                vector = len(shape) < 2  # LoRA of rank 1 has matrices of one row
            if whole or vector or leaf == "bias":
                names.add(name)
    return names


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    undecayed: set[str],
    parts: dict[str, tuple[str, ...]],
    config: OptimizerConfig,
) -> list[dict]:
    """One group per (part, decayed or not, matrix for Muon or not) that holds a trainable parameter.

    `base_lr` of a group is its peak rate; the trainer sets `lr` from it every step. Raises ConfigError if
    optimizer.parts names a part without trainable parameters, since its settings would change nothing.
    """
    groups: dict[tuple[str, bool, bool], dict] = {}
    for name, parameter in parameters.items():
        part = part_of(name, parts)
        own = config.parts.get(part)
        decays = name not in undecayed or (own is not None and own.decay_all)
        matrices = optimizer_kind(config.name).whole_matrices and _is_hidden_matrix(name, parameter, part, undecayed)
        decay = config.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        settings = {
            "part": part,
            "base_lr": peak_rate(config, part),
            "weight_decay": decay if decays else 0.0,
            "matrices": matrices,
        }
        group = groups.setdefault((part, decays, matrices), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    missing = set(config.parts) - {part for part, *_ in groups}
    if missing:
        raise ConfigError(f"optimizer.parts names {', '.join(sorted(missing))}, where nothing is trainable; remove it.")
    return list(groups.values())


def _is_hidden_matrix(name: str, parameter: nn.Parameter, part: str, undecayed: set[str]) -> bool:
    """Whether Muon is meant for a parameter: matrices that map one hidden state to another."""
    outside = part in (EMBEDDINGS, NEW_TOKENS, LM_HEAD)
    return parameter.ndim == 2 and not outside and name not in undecayed and not is_adapter(name)


class AdamW(torch.optim.AdamW):
    """torch's own, without what it is wrapped in for those who compile an optimizer: that imports the compiler when an optimizer
    is made, which takes longer than to import torch."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    return AdamW(groups, **_adam(config), fused=True)


def adamw_8bit(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    need("bitsandbytes", "optimizer.name=adamw_8bit")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **_adam(config))


def paged_adamw_8bit(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    need("bitsandbytes", "optimizer.name=paged_adamw_8bit")
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(groups, **_adam(config))


def lion(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    need("bitsandbytes", "optimizer.name=lion")
    from bitsandbytes.optim import Lion

    return Lion(groups, lr=config.lr, betas=tuple(config.betas))


def adafactor(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=config.lr)


def named(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The class that optimizer.name names as package.module:Class, with optimizer.arguments and what it takes of lr, betas and
    eps. Raises ConfigError if there is no such class, or it does not take the arguments."""
    module, _, name = config.name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        takes = inspect.signature(kind).parameters
        given = {key: value for key, value in _adam(config).items() if key in takes}
        return kind(groups, **{**given, **config.arguments})
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.name is {config.name}, which cannot be made ({error}).") from error


def _adam(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}


def make_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer named by the config, see `m4train.optimizers`."""
    module, _, function = optimizer_kind(config.name).make.partition(":")
    return getattr(importlib.import_module(module), function)(groups, config)


def build_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer named by the config, with its state allocated."""
    optimizer = make_optimizer(groups, config)
    allocate_state(optimizer)
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates every state tensor at its initial value, by an update with gradients and a rate of zero at step zero; without
    weight decay, which some optimizers add to the gradients."""
    decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        step = state.get("step")
        if step is not None:
            state["step"] = step.zero_() if isinstance(step, Tensor) else 0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One update, or none if `skip` () is 1.0.

    Fused AdamW reads the flag inside its kernel, so nothing waits for the device; 8-bit AdamW and Muon cannot, and wait.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        # Parameters kept in CPU memory read the flag at once: it must have arrived.
        optimizer.found_inf = skip.to(optimizer.param_groups[0]["params"][0].device)
        optimizer.step()
    elif not skip.item():
        optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every state value as a tensor, `optimizer/<kind>/<canonical name>`; those that are tensors already are live."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for kind, value in optimizer.state[parameter].items():
                tensors[f"optimizer/{kind}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def take_step_counts(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Sets the step counts that an optimizer keeps as Python numbers from tensors read out of a checkpoint."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if not isinstance(optimizer.state[parameter].get("step", torch.empty(0)), Tensor):
                optimizer.state[parameter]["step"] = int(tensors[f"optimizer/step/{name}"])
