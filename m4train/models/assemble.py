"""A new model out of a vision checkpoint (SigLIP, CLIP) and a text checkpoint (Llama, Mistral)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4train.errors import CheckpointError, ConfigError
from m4train.json_files import read_mapping
from m4train.models.initialisation import fill_normal
from m4train.models.layers import stretch_positions
from m4train.models.multimodal import MultimodalLM
from m4train.models.tensor_folder import TensorFolder

# Tensors of the checkpoints that these models have no use for: the pooling head, and the other towers in the same file.
_UNUSED_VISION = re.compile(
    r"^(text_model\.|text_projection|visual_projection|logit_|(vision_model\.)?head\.|.*position_ids$)"
)
_UNUSED_TEXT = re.compile(r".*rotary_emb\.inv_freq$")
_VISION_KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
]
_TEXT_KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "hidden_act",
]


def assemble(
    kind: type[MultimodalLM],
    vision: str | Path,
    text: str | Path,
    *,
    added_tokens: int = 0,
    generator: torch.Generator | None = None,
    **config: Any,
) -> Any:
    """A model of class `kind` with the weights of two folders; what neither holds starts out as in `init_weights`.

    Rows for `added_tokens` more ids follow those of the text model: N(0, 1/H) in the embedding and in the head. Position
    embeddings are stretched bicubically if `config` asks for another image_size (in its `vision_config`).

    Args:
        vision: folder of a SigLIP model (CLIP for Idefics); text: of a Llama or Mistral model.
        config: keys of the new config.json, in addition to those the folders decide.

    Raises:
        ConfigError: backbones that this kind of model cannot hold.
        CheckpointError: tensors of the folders that are missing, unknown, or of another shape.
    """
    model = kind(assembled_config(kind, vision, text, added_tokens=added_tokens, **config))
    return fill_from_backbones(model, vision, text, generator=generator)


def fill_from_backbones(
    model: Any, vision: str | Path, text: str | Path, *, generator: torch.Generator | None = None
) -> Any:
    """Gives `model`, of an assembled configuration, its weights, and returns it; see `assemble`."""
    text_values = _config_of(text, "text_config")
    model.init_weights(generator)
    flat = model.config_class.model_type == "idefics"
    # An untied head of a text model that had none of its own starts as its embedding.
    tied_source = bool(text_values.get("tie_word_embeddings"))
    _fill_vision(model, TensorFolder(vision), vision)
    _fill_text(model, TensorFolder(text), text, "model." if flat else "model.text_model.", tied_source, generator)
    model.tie_weights()
    return model


def assembled_config(
    kind: type[MultimodalLM],
    vision: str | Path | Mapping[str, Any],
    text: str | Path | Mapping[str, Any],
    *,
    added_tokens: int = 0,
    **config: Any,
) -> Any:
    """The configuration of the model that `assemble` makes of the same arguments; instead of a folder it takes what is in its
    config.json. Raises ConfigError as it does."""
    vision_values, text_values = _config_of(vision, "vision_config"), _config_of(text, "text_config")
    return kind.config_class.from_dict(_merged_config(kind, vision_values, text_values, added_tokens, config))


def _config_of(folder: str | Path | Mapping[str, Any], part: str) -> dict[str, Any]:
    if isinstance(folder, Mapping):
        return {**folder, **folder.get(part, {})}
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"there is no config.json in {folder}: name a folder that holds a saved model")
    values = read_mapping(path)
    return {**values, **values.get(part, {})}


def _merged_config(
    kind: type[MultimodalLM], vision: dict[str, Any], text: dict[str, Any], added: int, config: dict[str, Any]
) -> dict[str, Any]:
    towers = (
        {"clip_vision_model", "clip"}
        if kind.config_class.model_type == "idefics"
        else {"siglip_vision_model", "siglip"}
    )
    if vision.get("model_type") not in towers:
        raise ConfigError(
            f"the vision folder holds a {vision.get('model_type')!r}, but {kind.__name__} has a tower of one of "
            f"{', '.join(sorted(towers))}: give one of those"
        )
    tower = {**{key: vision[key] for key in _VISION_KEYS if key in vision}, **config.pop("vision_config", {})}
    tied = bool(text.get("tie_word_embeddings"))
    common = {"tie_word_embeddings": tied, **config, "vision_config": tower}
    if kind.config_class.model_type != "idefics":
        decoder = {**text, "vocab_size": text["vocab_size"] + added, **config.get("text_config", {})}
        return {**common, "text_config": decoder}
    if text.get("num_key_value_heads", text["num_attention_heads"]) != text["num_attention_heads"]:
        raise ConfigError(
            f"the text folder has {text['num_key_value_heads']} key heads for {text['num_attention_heads']} heads, but Idefics "
            "has as many of both: give another text model"
        )
    decoder = {key: text[key] for key in _TEXT_KEYS if key in text}
    return {**decoder, "vocab_size": text["vocab_size"], "additional_vocab_size": added, **common}


def _fill_vision(model: MultimodalLM, stored: TensorFolder, folder: str | Path) -> None:
    for name in stored.files:
        if _UNUSED_VISION.match(name):
            continue
        bare = name.removeprefix("vision_model.")
        tensor = stored[name]
        if bare == "embeddings.position_embedding.weight":
            tensor = _stretched(tensor, model.config.vision_config.grid, bool(tensor.shape[0] ** 0.5 % 1))
        _copy(model, f"model.vision_model.{bare}", tensor, folder)
    _check_complete(model, "model.vision_model.", {n.removeprefix("vision_model.") for n in stored.files}, folder)


def _stretched(positions: Tensor, grid: int, class_first: bool) -> Tensor:
    """Positions for a grid of another side; the class vector, if there is one, keeps its own."""
    first, rest = positions[: int(class_first)], positions[int(class_first) :]
    side = round(rest.shape[0] ** 0.5)
    if side != grid:
        # Over the ratio by less than fp32 sees, so that rounding down gives exactly the new side.
        scale = (grid + 1e-9) / side
        rest = stretch_positions(rest, side, (scale, scale))
    return torch.cat((first, rest))


def _fill_text(
    model: MultimodalLM,
    stored: TensorFolder,
    folder: str | Path,
    prefix: str,
    tied: bool,
    generator: torch.Generator | None,
) -> None:
    for name in stored.files:
        if _UNUSED_TEXT.match(name):
            continue
        if name == "lm_head.weight":
            _copy_rows(model.lm_head.weight, stored[name], generator)
        elif name == "model.embed_tokens.weight":
            _copy_rows(model.get_parameter(f"{prefix}embed_tokens.weight"), stored[name], generator)
        else:
            _copy(model, prefix + name.removeprefix("model."), stored[name], folder)
    found = {name.removeprefix("model.") for name in stored.files}
    _check_complete(model, f"{prefix}layers.", {n.removeprefix("layers.") for n in found}, folder)
    _check_complete(model, f"{prefix}norm.", {n.removeprefix("norm.") for n in found}, folder)
    if not model.config.tie_word_embeddings and "lm_head.weight" not in stored.files:
        if not tied:
            raise CheckpointError(f"{folder} lacks lm_head.weight: copy the folder again")
        _copy_rows(model.lm_head.weight, stored["model.embed_tokens.weight"], generator)


@torch.no_grad()
def _copy(model: MultimodalLM, name: str, tensor: Tensor, folder: str | Path) -> None:
    parameters = dict(model.named_parameters())
    if name not in parameters:
        raise CheckpointError(f"{folder} holds a tensor for {name}, which {type(model).__name__} does not have")
    if parameters[name].shape != tensor.shape:
        raise CheckpointError(
            f"{folder} gives {name} the shape {tuple(tensor.shape)}, but the model has {tuple(parameters[name].shape)}: leave "
            "the keys that decide it out of the configuration"
        )
    parameters[name].copy_(tensor)


@torch.no_grad()
def _copy_rows(parameter: Tensor, tensor: Tensor, generator: torch.Generator | None) -> None:
    """The rows of `tensor`, and new ones after them."""
    fill_normal(parameter, parameter.shape[1] ** -0.5, generator)
    parameter[: tensor.shape[0]].copy_(tensor)


def _check_complete(model: MultimodalLM, prefix: str, found: set[str], folder: str | Path) -> None:
    wanted = {name.removeprefix(prefix) for name, _ in model.named_parameters() if name.startswith(prefix)}
    missing = sorted(wanted - found)
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {prefix}* needs: give a complete checkpoint")
