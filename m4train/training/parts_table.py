"""The table of parts: what trains, how it is stored and computed, by which kernels, and at which rates; printed when a run begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from m4train.config import Config, optimizer_kind
from m4train.terminal import fitting
from m4train.training import optim
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_parameters, is_adapter, part_of
from m4train.training.precision import half_of

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class PartRow:
    """One line of the table: counts of parameters of a part, and what training does with them.

    `storage` and `decay` name every value that occurs; `state` is the dtype of the optimizer state. `state`, `lr` (the peak)
    and `decay` are empty if nothing of the part trains, and in the row `total`.
    """

    part: str
    parameters: int
    trainable: int
    adapted: int  # parameters of adapters inside this part
    quantized: int  # parameters stored in 4 bits
    storage: tuple[str, ...]
    compute: str
    attention: tuple[str, ...] = ()  # kernels of its attention layers
    state: str = ""
    lr: float | None = None
    decay: tuple[float, ...] = ()


def parameter_table(model: TrainableModel, config: Config, device: torch.device) -> list[PartRow]:
    """One row per part of the model, in the model's order, and a last row `total`; `device` is the one it trains on."""
    parts = model.parts()
    by_part: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in parts}
    for name, parameter in canonical_parameters(model).items():
        by_part[part_of(name, parts)].append((name, parameter))
    trainable = {name: p for members in by_part.values() for name, p in members if p.requires_grad}
    groups = optim.parameter_groups(trainable, optim.undecayed_names(model), parts, config.optimizer)
    dtype = half_of(config.trainer.precision) or torch.float32
    kernels = model.attention_kernels(device, dtype)
    rows = [
        _row(part, members, config, [g for g in groups if g["part"] == part], kernels.get(part, ()))
        for part, members in by_part.items()
    ]
    return [*rows, _row("total", [member for members in by_part.values() for member in members], config, [])]


def _row(
    part: str,
    members: list[tuple[str, nn.Parameter]],
    config: Config,
    groups: list[dict],
    kernels: tuple[str, ...] = (),
) -> PartRow:
    frozen = "fp32" if config.trainer.precision == "fp32" else config.freeze.frozen_dtype
    return PartRow(
        part=part,
        parameters=sum(_count(p) for _, p in members),
        trainable=sum(_count(p) for _, p in members if p.requires_grad),
        adapted=sum(_count(p) for name, p in members if is_adapter(name)),
        quantized=sum(_count(p) for _, p in members if not p.is_floating_point()),
        storage=tuple(sorted({_storage(p, frozen) for _, p in members})),
        compute=config.trainer.precision,
        attention=kernels,
        state=optimizer_kind(config.optimizer.name).state if groups else "",
        lr=groups[0]["base_lr"] if groups else None,
        decay=tuple(sorted({group["weight_decay"] for group in groups})),
    )


def _count(parameter: nn.Parameter) -> int:
    """Elements a parameter stands for: the packed bytes of a 4-bit one hold two each, a shard of ZeRO-3 knows the whole."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def _storage(parameter: nn.Parameter, frozen: str | None) -> str:
    """The dtype engines store a parameter in; `frozen` is that of frozen ones, None for that of their file."""
    if not parameter.is_floating_point():
        return "4-bit"
    if parameter.requires_grad:
        return "fp32"
    return frozen or _SHORT.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))


def format_table(rows: list[PartRow], width: int | None = None) -> str:
    """The table as aligned text, in blocks of at most `width` characters, each led by the names of the parts."""
    head = (
        "part",
        "parameters",
        "trainable",
        "adapters",
        "4-bit",
        "storage",
        "compute",
        "attention",
        "state",
        "rate",
        "decay",
    )
    cells = [head] + [
        (
            row.part,
            *(f"{count:,}" for count in (row.parameters, row.trainable, row.adapted, row.quantized)),
            "/".join(row.storage),
            row.compute,
            "/".join(row.attention),
            row.state,
            "" if row.lr is None else f"{row.lr:g}",
            "/".join(f"{decay:g}" for decay in row.decay),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    blocks = []
    for block in fitting([width + 2 for width in widths], None if width is None else width + 2):
        lines = [
            "  ".join(line[i].rjust(widths[i]) if i else line[i].ljust(widths[i]) for i in block) for line in cells
        ]
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)
