"""Low-rank adapters through peft, with targets resolved part by part to full module names; see also `adapter_files`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from m4train.config import ADAPTERS, AdapterConfig
from m4train.config.adapter_start import ANY_PART
from m4train.config.packages import need
from m4train.errors import ConfigError
from m4train.parts import LM_HEAD
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import ADAPTER_NAME, canonical_name, canonical_parameters, is_adapter, part_of
from m4train.training.quantization import dequantized, is_quantized, quantize_parts

ALL_LINEAR = "all-linear"  # in adapter.targets: every linear layer of the part but the head

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels whenever peft is imported


def resolve_targets(model: TrainableModel, targets: Mapping[str, list[str]]) -> list[str]:
    """Full names of the modules to adapt: those of each part whose last name is one of the part's targets, which may
    be patterns or `all-linear`.

    Raises ConfigError for a part the model does not have, or a target that matches no linear layer or embedding there.
    """
    parts, own = model.parts(), canonical_parameters(model)  # a tied weight belongs to the first module that holds it
    found: list[str] = []
    for part, wanted in targets.items():
        if part not in parts and part != ANY_PART:
            raise ConfigError(f"adapter.targets names part {part!r}, but this model has {', '.join(parts)}.")
        members = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
            and f"{name}.weight" in own
            and (part == ANY_PART or part_of(f"{name}.weight", parts) == part)
        ]
        for target in wanted:
            matched = [target] if target in members else [name for name in members if _is_meant(model, name, target)]
            if not matched:
                known = sorted({name.rsplit(".", 1)[-1] for name in members})
                raise ConfigError(
                    f"adapter.targets.{part} names {target!r}, which matches no module there; it has {', '.join(known)}."
                )
            found.extend(matched)
    holders = [parameter for module in model.modules() for parameter in module._parameters.values()]
    tied = [name for name in found if sum(own[f"{name}.weight"] is parameter for parameter in holders) > 1]
    if tied:
        raise ConfigError(
            f"adapter.targets names {', '.join(tied)}, whose weight is the head's too (tie_word_embeddings): an adapter on one "
            "of them would untie the two; take it out of adapter.targets, or train the weight itself by freeze.rules."
        )
    split = [name for name in found if list(model.get_submodule(name).children())]
    if split:
        raise ConfigError(
            f"adapter.targets names {', '.join(split)}, where new tokens have rows of their own, which an adapter cannot "
            "span: take it out of adapter.targets (the new rows train as the part new_tokens)."
        )
    return list(dict.fromkeys(found))


def _is_meant(model: TrainableModel, name: str, target: str) -> bool:
    """Whether a target means a module: by its name, the end of it, a pattern of either, or as one of all linear layers."""
    if target == ALL_LINEAR or any(mark in target for mark in "*?["):
        linear = (
            isinstance(model.get_submodule(name), nn.Linear) and part_of(f"{name}.weight", model.parts()) != LM_HEAD
        )
        return linear and (target == ALL_LINEAR or fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}"))
    return name == target or name.endswith(f".{target}")


def apply_adapters(model: TrainableModel, config: AdapterConfig) -> list[str]:
    """Puts adapters into the model in place and returns the canonical names of the adapted modules.

    Adapters are trainable, everything else is frozen until freezing rules say otherwise. Adapter weights are fp32.
    Raises ConfigError for an unknown kind and for targets that match nothing.
    """
    if config.kind == "none":
        return []
    if config.kind not in ADAPTERS:
        raise ConfigError(f"adapter.kind is {config.kind!r}, but must be one of {', '.join(ADAPTERS)}.")
    if not config.targets:
        raise ConfigError(
            "adapter.targets is empty; name modules per part, such as adapter.targets.text=[q_proj, v_proj]."
        )
    need("peft", f"adapter.kind={config.kind}")
    if config.kind == "qlora":
        need("bitsandbytes", "adapter.kind=qlora")
    from peft import inject_adapter_in_model

    wanted = resolve_targets(model, config.targets)
    if config.kind == "qlora":
        quantize_parts(model, config.quantize)
    inject_adapter_in_model(peft_config(config, wanted), model, adapter_name=ADAPTER_NAME)
    adapted = [canonical_name(name) for name, _ in _adapted_modules(model)]
    if sorted(adapted) != sorted(wanted):
        raise ConfigError(f"Adapters were asked for {sorted(wanted)} but landed in {sorted(adapted)}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()
    return adapted


def peft_config(config: AdapterConfig, targets: list[str]) -> Any:
    """peft's own configuration; targets are one pattern, since peft takes a list of names as suffixes."""
    from peft import LoraConfig

    pattern = "|".join(re.escape(name) for name in targets)
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=pattern,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.rank_stabilized,
        use_dora=config.kind == "dora",
    )


def settings_of_module(config: AdapterConfig, module: str) -> AdapterConfig:
    """`config` with the rank and alpha of one module, by its canonical name."""
    from peft.utils.other import get_pattern_key

    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.rank)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.alpha)
    return replace(config, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})


def _adapted_modules(model: TrainableModel) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def merge_adapters(model: TrainableModel) -> None:
    """Adds every adapter to the weights under it and removes it; the module names are the base model's again.

    Layers stored in 4 bits become plain ones first, adapted or not, so that what the adapter learned is not rounded away.
    """
    for name, module in _adapted_modules(model):
        base = module.get_base_layer()
        if is_quantized(base):
            base = dequantized(base)
            base.weight.data += module.get_delta_weight(ADAPTER_NAME).to(base.weight.dtype)
        else:
            module.merge(safe_merge=True, adapter_names=[ADAPTER_NAME])
        _replace(model, name, base)
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            _replace(model, name, dequantized(module))


def _replace(model: TrainableModel, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
