"""Linear layers stored in 4 bits, through bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from m4train.config.packages import need
from m4train.errors import ConfigError
from m4train.models.products import Linear


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """How `from_pretrained(quantization_config=...)` stores linear layers: the 4-bit fields of the reference's class.

    Raises:
        ConfigError: another storage than 4 bits, or an unknown quant type.
    """

    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "fp4"  # fp4 or nf4
    bnb_4bit_use_double_quant: bool = False  # quantise the scales too
    bnb_4bit_compute_dtype: torch.dtype | str | None = None  # of the products; None: float32
    llm_int8_skip_modules: Sequence[str] = ()  # names, or parts of names, of modules that stay as they are

    def __post_init__(self) -> None:
        if not self.load_in_4bit:
            raise ConfigError(
                "quantization_config has load_in_4bit false, but only 4 bits are implemented: set it, or leave it out"
            )
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise ConfigError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}: choose fp4 or nf4")

    @classmethod
    def of(cls, given: Any) -> BitsAndBytesConfig:
        """From such an object of any library, or a dict; what it says beyond these fields is not for this storage.

        Raises ConfigError without bitsandbytes, too.
        """
        need("bitsandbytes", "quantization_config")
        read: Any = given.get if isinstance(given, dict) else lambda name: getattr(given, name, None)
        values = {f.name: read(f.name) for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def compute_dtype(self) -> torch.dtype:
        wanted = self.bnb_4bit_compute_dtype or torch.float32
        return getattr(torch, wanted) if isinstance(wanted, str) else wanted


def quantize_linears(model: nn.Module, config: BitsAndBytesConfig) -> None:
    """Replaces every linear layer but those of the head and those to skip, in place; for inference, or under adapters.

    Raises ConfigError for a name to skip that no module has.
    """
    names = [name for name, _ in model.named_modules()]
    for skipped in config.llm_int8_skip_modules:
        if not any(_within(name, skipped) for name in names):
            raise ConfigError(
                f"llm_int8_skip_modules names {skipped}, which is not a module of {type(model).__name__}: name one, such as "
                "vision_model"
            )
    for name, module in list(model.named_modules()):
        kept = any(_within(name, skipped) for skipped in config.llm_int8_skip_modules)
        if is_plain(module) and not name.startswith("lm_head") and not kept:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, four_bit(module, config))


def _within(name: str, part: str) -> bool:
    """Whether `part` is a module on the way to `name`."""
    return f".{part}." in f".{name}."


def four_bit(linear: nn.Linear, config: BitsAndBytesConfig) -> nn.Module:
    """The 4-bit layer of a linear one, on the same device."""
    import bitsandbytes as bnb

    kind, double = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=config.compute_dtype,
            compress_statistics=double,
            quant_type=kind,
        )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type=kind, compress_statistics=double
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    # On some CPUs bitsandbytes repacks a weight at its first use in evaluation, and drops the scales that a checkpoint keeps.
    layer.support_avx512bf16_for_cpu = False
    return layer.to(linear.weight.device)  # the move is what quantises


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more; subclasses such as a head with a loss of its own are not."""
    return type(module) in (Linear, nn.Linear)


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer is stored in 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None
