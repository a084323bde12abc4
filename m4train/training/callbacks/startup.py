"""What the time before the first step went into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m4train import startup
from m4train.terminal import stage
from m4train.training.callbacks.base import Callback

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer


class Startup(Callback):
    """Prints it once on rank 0, and adds it to the metrics that are logged first. Only a command has a start."""

    def __init__(self) -> None:
        self._spent: dict[str, float] | None = None  # of each part, as soon as the first step is done
        self._logged = self._said = False

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        spent = self._first_step_done()
        if self._logged or not spent:
            return {}
        self._logged = True
        parts = {f"startup/{name.replace(' ', '_')}": seconds for name, seconds in spent.items()}
        return {"startup_seconds": sum(spent.values()), **parts}

    def on_step_end(self, trainer: Trainer) -> None:
        spent = self._first_step_done()
        if spent and not self._said and trainer.engine.rank == 0:
            stage(None)
            print(startup.line(spent), flush=True)
        self._said = True

    def _first_step_done(self) -> dict[str, float]:
        if self._spent is None:
            self._spent = startup.ended()
        return self._spent
