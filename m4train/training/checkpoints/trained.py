"""Which parameters a run trains that its checkpoint did not, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass

from m4train.config import Config
from m4train.errors import CheckpointError
from m4train.training.checkpoints.changes import differences
from m4train.training.checkpoints.save import TENSORS
from m4train.training.checkpoints.state import Checkpoint
from m4train.training.checkpoints.tensor_files import stored_tensors
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_parameters
from m4train.training.tensors import NATIVE, OPTIMIZER

_KEYS = ("freeze.rules", "adapter.modules_to_save")


@dataclass(frozen=True)
class TrainedAnew:
    """Canonical names of the parameters that `join` those that train, with moments and a step count that begin at zero, and of
    those that `leave` them, whose moments are lost."""

    join: frozenset[str] = frozenset()
    leave: frozenset[str] = frozenset()

    def __str__(self) -> str:
        said = []
        if self.join:
            said.append(f"{len(self.join)} more parameters train, whose moments begin at zero")
        if self.leave:
            said.append(f"{len(self.leave)} train no longer, and lose their moments")
        return "".join(f"; {text}" for text in said)


def trained_anew(checkpoint: Checkpoint, model: TrainableModel, config: Config) -> TrainedAnew:
    """What the freezing rules of a run, already applied to its model, change for the optimizer of a checkpoint.

    Raises CheckpointError if that holds its optimizer as ZeRO keeps it, whose pieces no other set of parameters fits.
    """
    if not differences(checkpoint.state["config"], config, _KEYS):
        return TrainedAnew()
    held = stored_tensors(checkpoint.folder / TENSORS)
    if any(name.startswith(NATIVE) for name in held):
        raise CheckpointError(
            f"Checkpoint {checkpoint.folder} holds the optimizer in pieces of the parameters that trained, and other rules say "
            "what trains now: continue with the same rules once with engine.checkpoint=portable, or set resume_optimizer=fresh."
        )
    then = {name.split("/", 2)[2] for name in held if name.startswith(OPTIMIZER)}
    if not then:  # an optimizer without moments
        return TrainedAnew()
    now = {name for name, parameter in canonical_parameters(model).items() if parameter.requires_grad}
    return TrainedAnew(frozenset(now - then), frozenset(then - now))
