"""Which parameters train: ordered rules over the model's parts, and a table of the outcome."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from m4train.config import FreezeConfig, FreezeRule
from m4train.errors import ConfigError
from m4train.training.naming import canonical_name, canonical_parameters, is_adapter, part_of


@dataclass(frozen=True)
class PartRow:
    """One line of the table of parts: counts of parameters, and the dtypes they are stored in."""

    part: str
    parameters: int
    trainable: int
    adapted: int  # parameters of adapters inside this part
    quantized: int  # parameters stored in 4 bits
    dtypes: tuple[str, ...]


def _described(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Every base parameter with its canonical name and the class name of the module that holds it."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if id(parameter) not in seen and not is_adapter(name):
                seen.add(id(parameter))
                yield canonical_name(name), parameter, type(module).__name__


def apply_freezing(model: nn.Module, config: FreezeConfig) -> None:
    """Sets `requires_grad` of every base parameter by the ordered rules; later rules win, adapters are left alone.

    Without adapters the model starts as its own configuration freezes it; with adapters everything but them starts frozen.
    Raises ConfigError for a
    rule that matches nothing, names an unknown part, or leaves nothing to train.
    """
    parts = model.parts()
    adapted = any(is_adapter(name) for name, _ in model.named_parameters())
    described = [(name, parameter, kind, part_of(name, parts)) for name, parameter, kind in _described(model)]
    for _, parameter, _, _ in described:
        parameter.requires_grad_(not adapted and parameter.requires_grad)
    for number, rule in enumerate(config.rules):
        _check_part(rule, number, parts)
        matched = [p for name, p, kind, part in described if _matches(rule, name, kind, part)]
        if not matched:
            raise ConfigError(
                f"freeze.rules[{number}] ({_text(rule)}) matches no parameter; correct its part, names or module types."
            )
        if rule.trainable and not all(parameter.is_floating_point() for parameter in matched):
            raise ConfigError(
                f"freeze.rules[{number}] ({_text(rule)}) makes weights trainable that adapter.quantize stores in 4 bits; "
                "leave them frozen, or take their part out of adapter.quantize."
            )
        for parameter in matched:
            parameter.requires_grad_(rule.trainable)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("freeze.rules leave no trainable parameter; make some part trainable or choose an adapter.")


def _check_part(rule: FreezeRule, number: int, parts: dict[str, tuple[str, ...]]) -> None:
    if rule.part is not None and rule.part not in parts:
        hint = "; freeze.new_rows_from makes new_tokens" if rule.part == "new_tokens" else ""
        raise ConfigError(f"freeze.rules[{number}].part is {rule.part!r}, but this model has {', '.join(parts)}{hint}.")


def _matches(rule: FreezeRule, name: str, module_type: str, part: str) -> bool:
    if rule.part is not None and rule.part != part:
        return False
    if rule.names and not any(fnmatchcase(name, pattern) for pattern in rule.names):
        return False
    return not rule.module_types or any(fnmatchcase(module_type, pattern) for pattern in rule.module_types)


def _text(rule: FreezeRule) -> str:
    return f"part={rule.part}, names={rule.names}, module_types={rule.module_types}"


def parameter_table(model: nn.Module) -> list[PartRow]:
    """One row per part of the model, in the model's order, and a last row `total`."""
    parts = model.parts()
    by_part: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in parts}
    for name, parameter in canonical_parameters(model).items():
        by_part[part_of(name, parts)].append((name, parameter))
    rows = [_row(part, members) for part, members in by_part.items()]
    return [*rows, _row("total", [member for members in by_part.values() for member in members])]


def _row(part: str, members: list[tuple[str, nn.Parameter]]) -> PartRow:
    return PartRow(
        part=part,
        parameters=sum(_count(p) for _, p in members),
        trainable=sum(p.numel() for _, p in members if p.requires_grad),
        adapted=sum(p.numel() for name, p in members if is_adapter(name)),
        quantized=sum(_count(p) for _, p in members if not p.is_floating_point()),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for _, p in members})),
    )


def _count(parameter: nn.Parameter) -> int:
    """Elements a parameter stands for: the packed bytes of a 4-bit one hold two each."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def format_table(rows: list[PartRow]) -> str:
    """The table as aligned text."""
    lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}{'adapters':>14}{'4-bit':>16}  dtype"]
    for row in rows:
        lines.append(
            f"{row.part:<16}{row.parameters:>16,}{row.trainable:>16,}{row.adapted:>14,}{row.quantized:>16,}  {', '.join(row.dtypes)}"
        )
    return "\n".join(lines)
