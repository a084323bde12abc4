"""Frozen linear layers stored in 4 bits: NF4 with double quantisation (Dettmers et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m4train.errors import ConfigError
from m4train.models.products import Linear
from m4train.models.quantized import BitsAndBytesConfig, four_bit, is_plain, is_quantized
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_name, canonical_parameters, part_of

__all__ = ["dequantized", "is_quantized", "quantization_tensors", "quantize_parts"]

_NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def quantize_parts(model: TrainableModel, parts: Sequence[str]) -> list[str]:
    """Replaces the plain linear layers of the named parts by 4-bit ones, in place; returns their names.

    Subclasses of `nn.Linear` (a head with a loss of its own) keep their precision, as do all parts that are not named.
    Raises ConfigError for a part that is unknown or has no linear layer.
    """
    known, own = model.parts(), canonical_parameters(model)
    replaced = []
    for part in parts:
        names = [
            name
            for name, module in model.named_modules()
            if is_plain(module) and f"{name}.weight" in own and part_of(f"{name}.weight", known) == part
        ]
        if not names:
            raise ConfigError(
                f"adapter.quantize names {part!r}, which has no linear layer; it must be of {', '.join(known)}."
            )
        for name in names:
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, four_bit(getattr(owner, leaf), _NF4))
        replaced.extend(names)
    model.is_loaded_in_4bit = True  # type: ignore[attr-defined]  # how peft is told to put its 4-bit adapter layers around them
    return replaced


def dequantized(module: Any) -> nn.Linear:
    """A plain linear layer with the values the 4-bit one stands for, in fp32."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    layer = Linear(module.in_features, module.out_features, bias=module.bias is not None, device=weight.device)
    layer.weight.data = weight
    if module.bias is not None:
        layer.bias.data = module.bias.data.float()
    return layer


def quantization_tensors(model: TrainableModel) -> dict[str, Tensor]:
    """The live scales of every 4-bit weight, by canonical name, so that a checkpoint holds all of its value."""
    found = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found[f"{canonical_name(name)}.absmax"] = state.absmax
            found[f"{canonical_name(name)}.nested_absmax"] = state.state2.absmax
            found[f"{canonical_name(name)}.offset"] = state.offset
    return found
