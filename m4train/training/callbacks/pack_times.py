"""How long packs take on the devices of this run, by which they are shared among ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from m4train.batch import PackedBatch
from m4train.pack_costs import PackCosts, fit_costs
from m4train.training.callbacks.base import Callback
from m4train.training.engines.base import Engine, agreed

if TYPE_CHECKING:
    from m4train.training.trainer import Trainer

Shape = tuple[float, ...]  # packs, tokens, squared tokens, frames


class PackTimes(Callback):
    """Times micro-batches before the first step of a run, all ranks the same one at once, so that under no engine one waits for
    another, and fits what a pack costs each kind of device. Checkpoints keep that, so that a run goes on as it began.

    `packs()` makes the micro-batches that are timed, and `use(costs, kinds)` is told the costs of each kind of device and which
    kind that of each rank is, unless they cannot be known.
    """

    def __init__(
        self,
        packs: Callable[[], Sequence[tuple[Shape, PackedBatch]]],
        use: Callable[[Sequence[PackCosts], Sequence[int]], None],
    ) -> None:
        self._packs, self._use = packs, use
        self._known: dict[str, list[float] | None] = {}  # None: not by times

    def load(self, state: dict[str, Any]) -> None:
        self._known = dict(state)

    def state(self) -> dict[str, Any]:
        return self._known

    def on_start(self, trainer: Trainer) -> None:
        engine = trainer.engine
        device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
        devices: list[str] = engine.broadcast(engine.gather(device))
        names = sorted(set(devices))
        if not self._known.keys() >= set(names):
            self._measure(trainer, devices)
        costs = [PackCosts(*known) for name in names if (known := self._known[name]) is not None]
        if len(costs) == len(names):
            self._use(costs, [names.index(device) for device in devices])

    def _measure(self, trainer: Trainer, devices: list[str]) -> None:
        engine = trainer.engine
        shapes, batches = zip(*self._packs(), strict=True)
        trainer.model.train()
        taken = engine.gather(timed(engine, batches, trainer.config.model.z_loss))
        found = agreed(engine, lambda: {name: _fitted(name, shapes, devices, taken) for name in sorted(set(devices))})
        self._known |= {name: costs for name, (costs, _) in found.items()}
        if engine.rank == 0:
            print(*(line for _, line in found.values()), sep="\n", flush=True)


def _fitted(
    name: str, shapes: Sequence[Shape], devices: Sequence[str], taken: Sequence[Sequence[float]]
) -> tuple[list[float] | None, str]:
    """The costs on one kind of device, by the median over its ranks, and what is said about them."""
    own = [seconds for device, seconds in zip(devices, taken, strict=True) if device == name]
    try:
        costs, spread = fit_costs(shapes, [median(each) for each in zip(*own, strict=True)])
    except ValueError as error:
        return None, (
            f"note: what packs cost on {name} was not found by timing {len(shapes)} micro-batches ({error}): packs are shared "
            "among ranks by data.cost.squared and data.cost.frame."
        )
    return list(costs), (
        f"packs are shared among ranks by what they cost on {name}: {costs.pack:.2g} s + {costs.token:.2g} a token + "
        f"{costs.squared:.2g} a squared token + {costs.frame:.2g} a frame (within {spread:.1%} of {len(shapes)} timed micro-batches)."
    )


def timed(engine: Engine, batches: Sequence[PackedBatch], z_loss: float) -> list[float]:
    """Seconds that forward and backward of each micro-batch take, after the first for a warm-up: of the device, or of the processors,
    which other programs do not add to. Weights, optimizer and gradients stay as they were."""
    marks: list[Any] = []
    for number, batch in enumerate([batches[0], *batches]):
        here, last = batch.to(engine.device), number == len(batches)
        begun = _mark(engine.device)
        with engine.accumulation(last):
            loss = engine.forward(here, z_loss).loss
            engine.backward(loss * float("nan") if last else loss, last)
        marks.append((begun, _mark(engine.device)))
    engine.update(0.0, 1.0)  # drops the gradients: none of them is a number
    if engine.device.type != "cuda":
        return [end - begun for begun, end in marks[1:]]
    torch.cuda.synchronize(engine.device)
    return [begun.elapsed_time(end) / 1000 for begun, end in marks[1:]]


def _mark(device: torch.device) -> Any:
    """This moment in the work of the device; nothing waits for it."""
    if device.type != "cuda":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
