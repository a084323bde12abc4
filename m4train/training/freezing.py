"""Which parameters train: ordered rules over the model's parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from m4train.config import FreezeConfig, FreezeRule
from m4train.errors import ConfigError
from m4train.parts import LM_HEAD, NEW_TOKENS
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_name, is_adapter, part_of


def _described(model: TrainableModel) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Every base parameter with its canonical name and the class name of the module that holds it."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if id(parameter) not in seen and not is_adapter(name):
                seen.add(id(parameter))
                yield canonical_name(name), parameter, type(module).__name__


def apply_freezing(
    model: TrainableModel, config: FreezeConfig, in_full: Sequence[str] = (), new_tokens: bool = False
) -> None:
    """Sets `requires_grad` of every base parameter by the ordered rules; later rules win, adapters are left alone.

    Without adapters the model starts as its own configuration freezes it; with adapters everything but them starts frozen,
    and but the part new_tokens if the run made it (`new_tokens`).
    The parts or modules `in_full` (adapter.modules_to_save) are rules that come last. Raises ConfigError for a rule that
    matches nothing, names an unknown part, or leaves nothing to train.
    """
    parts = model.parts()
    adapted = any(is_adapter(name) for name, _ in model.named_parameters())
    described = [(name, parameter, kind, part_of(name, parts)) for name, parameter, kind in _described(model)]
    for _, parameter, _, part in described:
        begins = new_tokens and part == NEW_TOKENS
        parameter.requires_grad_(begins or (not adapted and parameter.requires_grad))
    for key, rule in [*_written(config.rules, parts), *_trained_in_full(in_full, parts)]:
        matched = [p for name, p, kind, part in described if _matches(rule, name, kind, part)]
        matched = matched or _tied(model, rule)
        if not matched:
            raise ConfigError(
                f"{key} ({_text(rule)}) matches no parameter; correct its part, names or module types; this model has the "
                f"parts {', '.join(parts)}."
            )
        if rule.trainable and not all(parameter.is_floating_point() for parameter in matched):
            raise ConfigError(
                f"{key} ({_text(rule)}) makes weights trainable that adapter.quantize stores in 4 bits; "
                "leave them frozen, or take their part out of adapter.quantize."
            )
        for parameter in matched:
            parameter.requires_grad_(rule.trainable)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("freeze.rules leave no trainable parameter; make some part trainable or choose an adapter.")


def _tied(model: nn.Module, rule: FreezeRule) -> list[nn.Parameter]:
    """What a rule names by another name than the first one of a tied parameter, such as that of a head."""
    every = ((canonical_name(name), p) for name, p in model.named_parameters(remove_duplicate=False))
    return [p for name, p in every if rule.names and any(fnmatchcase(name, pattern) for pattern in rule.names)]


def _written(rules: Sequence[FreezeRule], parts: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, FreezeRule]]:
    for number, rule in enumerate(rules):
        _check_part(rule, number, parts)
        yield f"freeze.rules[{number}]", rule


def _trained_in_full(names: Sequence[str], parts: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, FreezeRule]]:
    """One rule for each part, or for the modules whose whole or last names a pattern is."""
    for number, name in enumerate(names):
        key = f"adapter.modules_to_save[{number}]"
        if name not in parts and name in _HINTS:
            raise ConfigError(f"{key} is {name!r}, but this model has {', '.join(parts)}{_HINTS[name]}.")
        rule = FreezeRule(part=name) if name in parts else FreezeRule(names=[f"{name}.*", f"*.{name}.*"])
        rule.trainable = True
        yield key, rule


_HINTS = {
    NEW_TOKENS: "; freeze.new_rows_from and model.add_tokens make new_tokens",
    "norms": '; the norms of all parts are module_types: ["*Norm"]',
    "resampler": "; a resampler is the connector",
    LM_HEAD: "; a head tied to the embeddings is them",
}


def _check_part(rule: FreezeRule, number: int, parts: dict[str, tuple[str, ...]]) -> None:
    if rule.part is not None and rule.part not in parts:
        hint = _HINTS.get(rule.part, "")
        raise ConfigError(f"freeze.rules[{number}].part is {rule.part!r}, but this model has {', '.join(parts)}{hint}.")


def _matches(rule: FreezeRule, name: str, module_type: str, part: str) -> bool:
    if rule.part is not None and rule.part != part:
        return False
    if rule.names and not any(fnmatchcase(name, pattern) for pattern in rule.names):
        return False
    return not rule.module_types or any(fnmatchcase(module_type, pattern) for pattern in rule.module_types)


def _text(rule: FreezeRule) -> str:
    return f"part={rule.part}, names={rule.names}, module_types={rule.module_types}"
