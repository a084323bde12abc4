"""The plan of one rank, computed in the same process or in one of its own."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from m4train.data.loading.processes import lifeline, live_with_the_trainer, worker_context
from m4train.data.plan.plan import Plan, PlannedPack
from m4train.data.plan.sample_order import Dropped
from m4train.errors import DataError, M4Error


@dataclass(frozen=True)
class RankStep:
    """One optimizer step as one rank sees it: the packs of each of its micro-batches."""

    step: int
    micro_batches: tuple[tuple[PlannedPack, ...], ...]
    dropped: tuple[Dropped, ...]
    state: dict[str, Any]


@dataclass(frozen=True)
class RankPlan:
    """Steps `start_step` + 1 (or the one after `state`) to `stop_step` of the plan, for one rank. Iterate it to compute them."""

    plan: Plan
    rank: int
    world_size: int
    micro_batch_size: int
    state: dict[str, Any] | None
    start_step: int
    stop_step: int | None

    def __iter__(self) -> Iterator[RankStep]:
        for step in self.plan.steps(self.state):
            if self.stop_step is not None and step.step > self.stop_step:
                return
            if step.step <= self.start_step:
                continue
            mine = self.plan.shared(step.packs, self.world_size, self.micro_batch_size)[self.rank]
            groups = tuple(tuple(step.packs[number] for number in group) for group in mine)
            yield RankStep(step.step, groups, step.dropped, step.state)


def planned_aside(plan: RankPlan) -> Iterator[RankStep]:
    """The steps of `plan`, computed by another process, which runs ahead by as much as a pipe holds.

    Raises what the plan raises, and DataError if its process dies. The process ends with the iterator, and with this
    process, however it ends: it then finds nobody at the other end of the pipe.
    """
    context = worker_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_steps, args=(plan, sender, lifeline()[0]), name="m4train-plan", daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            try:
                received = receiver.recv()
            except (EOFError, ConnectionError) as error:
                process.join(5)
                raise DataError(
                    f"The planning process died (exit code {process.exitcode}): start the run again; it continues "
                    "from its last checkpoint."
                ) from error
            if received is None:
                return
            if isinstance(received, Exception):
                raise received
            yield received
    finally:
        receiver.close()
        process.join(5)


def _send_steps(plan: RankPlan, sender: Connection, line: Connection) -> None:
    """Runs in the planning process."""
    live_with_the_trainer(line)
    try:
        try:
            for step in plan:
                sender.send(step)
            sender.send(None)
        except M4Error as error:
            sender.send(error)
        except (BrokenPipeError, ConnectionError):
            return
        except Exception:
            sender.send(DataError(f"The planning process failed: {traceback.format_exc()}"))
    finally:
        sender.close()
