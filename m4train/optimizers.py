"""The optimizers, one row each. To add one, add a row and the function it names. Imports nothing of m4train."""

from __future__ import annotations

from typing import NamedTuple

_WHOLE = ("single", "ddp")


class OptimizerKind(NamedTuple):
    """What the rest of the program has to know of an optimizer before it is loaded."""

    make: str  # "module:function", called with the parameter groups and OptimizerConfig
    state: str = "fp32"  # how its state is stored, for the table of parts
    package: str = ""  # what has to be installed for it
    engines: tuple[str, ...] | None = None  # the engines that it works with; None: all
    why_not: str = ""  # the reason why it does not work with the others
    whole_matrices: bool = (
        False  # matrices of hidden layers are groups of their own and whole when updated; has momentum
    )


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("m4train.training.optim:adamw"),
    "adamw_8bit": OptimizerKind(
        "m4train.training.optim:adamw_8bit",
        state="8-bit",
        package="bitsandbytes",
        engines=_WHOLE,
        why_not="its block-wise quantised state belongs to whole tensors, not to shards",
    ),
    "paged_adamw_8bit": OptimizerKind(
        "m4train.training.optim:paged_adamw_8bit",
        state="8-bit",
        package="bitsandbytes",
        engines=_WHOLE,
        why_not="its block-wise quantised state belongs to whole tensors, not to shards",
    ),
    "adafactor": OptimizerKind(
        "m4train.training.optim:adafactor",
        state="factored",
        engines=_WHOLE,
        why_not="its state is the rows and columns of whole matrices, not of shards",
    ),
    "lion": OptimizerKind(
        "m4train.training.optim:lion",
        package="bitsandbytes",
        engines=_WHOLE,
        why_not="bitsandbytes updates whole tensors, not shards",
    ),
    "schedule_free": OptimizerKind(
        "m4train.training.schedule_free:schedule_free",
        package="schedulefree",
        engines=_WHOLE,
        why_not="it moves whole weights between two points in every step",
    ),
    "muon": OptimizerKind(
        "m4train.training.muon:MuonAdamW",
        engines=(*_WHOLE, "fsdp2"),
        why_not="it makes whole matrices orthogonal, and each rank would hold flat shards",
        whole_matrices=True,
    ),
}


def optimizer_kind(name: str) -> OptimizerKind:
    """The row of an optimizer; of one that is given as "package.module:Class", what holds for all of them. Raises KeyError."""
    if ":" not in name:
        return OPTIMIZERS[name]
    return OptimizerKind(
        "m4train.training.optim:named",
        state="its own",
        engines=_WHOLE,
        why_not="whether its update may be made on shards is not known",
    )
