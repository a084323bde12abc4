"""What may follow a run, one row each. To add one, add a row and the class it names. Imports nothing of m4train."""

from __future__ import annotations

from typing import NamedTuple


class TrackerKind(NamedTuple):
    """What the rest of the program has to know of a tracker before it is loaded."""

    make: str  # "module:Class", called with the Config of a run
    package: str = ""  # what has to be installed for it
    extra: str = ""  # the extra of m4train that installs it


TRACKERS: dict[str, TrackerKind] = {
    "jsonl": TrackerKind("m4train.training.callbacks.jsonl:Jsonl"),  # always there: reports are made of it
    "wandb": TrackerKind("m4train.training.callbacks.wandb:Wandb", "wandb"),
    "tensorboard": TrackerKind("m4train.training.callbacks.tensorboard:TensorBoard", "tensorboard", "tensorboard"),
}


def tracker_kind(name: str) -> TrackerKind:
    """The row of a tracker, or one for "package.module:Class". Raises KeyError."""
    return TrackerKind(name) if ":" in name else TRACKERS[name]
