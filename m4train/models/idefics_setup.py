"""How an Idefics model starts out: its random weights, and what its configuration freezes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from m4train.errors import ConfigError
from m4train.models.initialisation import fill_normal, init_modules
from m4train.models.model_configs import IdeficsConfig


def freeze(roots: list[nn.Module], exceptions: list[str], key: str) -> None:
    """Freezes the parameters of `roots`, except those held by a module of one of the types named in `exceptions`.

    Raises:
        ConfigError: a name that no module has.
    """
    modules = [module for root in roots for module in root.modules()]
    kinds = {module: {kind.__name__ for kind in type(module).__mro__} for module in modules}
    for name in exceptions:
        if not any(name in names for names in kinds.values()):
            found = sorted({type(module).__name__ for module in modules if list(module.parameters(recurse=False))})
            raise ConfigError(f"{key} names {name!r}, which is not a frozen module: there are {', '.join(found)}")
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(not kinds[module].isdisjoint(exceptions))


def init_idefics(model: Any, generator: torch.Generator | None = None) -> None:
    """Normal weights, biases 0, norms 1; scaled by width and depth in what joins images and text; gates as configured."""
    config = model.config
    init_modules(model, config.initializer_range, generator)
    size, depth = config.hidden_size, 2 * config.num_hidden_layers
    fill_normal(model.embed_tokens.weight, size**-0.5, generator)
    padding = config.pad_token_id
    if padding is not None and padding < config.vocab_size and not model.embed_tokens.weight.is_meta:
        with torch.no_grad():
            model.embed_tokens.weight[padding] = 0.0
    if model.embed_tokens.additional_embedding is not None:
        fill_normal(model.embed_tokens.additional_embedding.weight, size**-0.5, generator)
    fill_normal(model.vision_model.embeddings.class_embedding, 1.0, generator)
    for layer in model.gated_cross_attn_layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                share = depth if name == "mlp.down_proj" else 1
                fill_normal(module.weight, (0.4 / (module.in_features * share)) ** 0.5, generator)
        for alpha in (layer.alpha_cross_attn, layer.alpha_dense):
            _fill_gate(alpha, config, generator)
    if config.use_resampler:
        image_size = config.vision_config.embed_dim
        fill_normal(model.perceiver_resampler.latents, image_size**-0.5, generator)
        for name, module in model.perceiver_resampler.named_modules():
            if isinstance(module, nn.Linear):
                share = depth if name.endswith("c_proj") else 1
                fill_normal(module.weight, (0.4 / (image_size * share)) ** 0.5, generator)


def _fill_gate(alpha: Tensor, config: IdeficsConfig, generator: torch.Generator | None) -> None:
    if config.alpha_initializer in ("zeros", "ones"):
        nn.init.constant_(alpha, float(config.alpha_initializer == "ones"))
    else:
        fill_normal(alpha, config.alphas_initializer_range, generator)
