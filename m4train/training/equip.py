"""What training adds to a plain model."""

from __future__ import annotations

from typing import Any

import torch

from m4train.config import Config
from m4train.models.token_rows import has_own_rows
from m4train.training.adapters import apply_adapters
from m4train.training.freezing import apply_freezing
from m4train.training.quantization import is_quantized


def equip(model: Any, config: Config, new_from: int | None = None) -> None:
    """Gives a plain model rows of the new tokens apart (those with ids from `new_from` on; None: none), adapters, and what
    is frozen, as the configuration asks."""
    if new_from is not None and (
        new_from == config.freeze.new_rows_from or not has_own_rows(model.get_input_embeddings())
    ):
        model.split_token_rows(new_from)
    torch.manual_seed(config.seed)  # adapters draw their first weights from the global generator
    apply_adapters(model, config.adapter)
    if config.trainer.precision == "fp16":  # as everything around them is
        for module in model.modules():
            if is_quantized(module):
                module.compute_dtype = torch.float16
    new_tokens = new_from is not None or bool(config.model.add_tokens)
    apply_freezing(model, config.freeze, config.adapter.modules_to_save, new_tokens)
