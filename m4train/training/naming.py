"""One map from the names a wrapped model shows to the names of the published checkpoints."""

from __future__ import annotations

from torch import Tensor, nn

from m4train.errors import TrainingError

ADAPTER_NAME = "default"


def canonical_name(name: str) -> str:
    """The hub's name of a parameter or module, whatever peft or an engine has wrapped around it.

    `a.q_proj.base_layer.weight` is `a.q_proj.weight`; `a.q_proj.lora_A.default.weight` is `a.q_proj.lora_A.weight`.
    """
    words: list[str] = []
    for word in name.split("."):
        if word in ("base_layer", "_orig_mod") or (word == "module" and not words):
            continue
        if word == ADAPTER_NAME and words and words[-1].startswith("lora_"):
            continue
        words.append(word)
    return ".".join(words)


def is_adapter(name: str) -> bool:
    """Whether a parameter name belongs to an adapter."""
    return any(word.startswith("lora_") for word in name.split("."))


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once (tied ones under the first of their names), by canonical name."""
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers a checkpoint holds, by canonical name."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[canonical_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def part_of(name: str, parts: dict[str, tuple[str, ...]]) -> str:
    """The part a canonical name belongs to; the longest matching prefix decides.

    Raises TrainingError if no part claims the name.
    """
    best, best_length = None, -1
    for part, prefixes in parts.items():
        for prefix in prefixes:
            if name.startswith(prefix) and len(prefix) > best_length:
                best, best_length = part, len(prefix)
    if best is None:
        raise TrainingError(f"Parameter {name} belongs to none of the model's parts ({', '.join(parts)}).")
    return best
