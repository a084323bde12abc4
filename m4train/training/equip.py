"""What training adds to a plain model."""

from __future__ import annotations

from typing import Any

import torch

from m4train.config import Config
from m4train.training.adapters import apply_adapters
from m4train.training.freezing import apply_freezing
from m4train.training.quantization import is_quantized


def equip(model: Any, config: Config) -> None:
    """Gives a plain model rows of new tokens apart, adapters, and what is frozen, as the configuration asks."""
    if config.freeze.new_rows_from is not None:
        model.split_token_rows(config.freeze.new_rows_from)
    torch.manual_seed(config.seed)  # adapters draw their first weights from the global generator
    apply_adapters(model, config.adapter)
    if config.trainer.precision == "fp16":  # as everything around them is
        for module in model.modules():
            if is_quantized(module):
                module.compute_dtype = torch.float16
    apply_freezing(model, config.freeze, config.adapter.modules_to_save)
