"""What engines of several processes share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor

from m4train.config import Config
from m4train.training.engines.processes import Processes
from m4train.training.engines.single import SingleEngine
from m4train.training.heartbeat import PATIENCE

_FOREVER = 7 * 24 * 3600.0


class DistributedEngine(SingleEngine):
    """What engines of several processes share: agreement, reduction, and a loss scaled against averaged gradients."""

    def __init__(self, config: Config) -> None:
        # The heartbeat, which can name the stage and the samples, speaks before a collective gives up.
        seconds = 2 * PATIENCE * config.trainer.hang_timeout or _FOREVER
        self.processes = Processes(timedelta(seconds=seconds))
        super().__init__(config, self.processes.device)
        self.rank, self.world_size = self.processes.rank, self.processes.world_size
        self.checkpoint_group = self.processes.checkpoint_group

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`; `loss` ()."""
        (self.scale.scaled(loss) * self.world_size).backward()

    def reduce(self, values: Tensor) -> Tensor:
        """See `Engine.reduce`: the same shape (...)."""
        return self.processes.reduce(values)

    def agree(self, values: Sequence[int]) -> list[int]:
        return self.processes.agree(values)

    def broadcast(self, value: Any) -> Any:
        return self.processes.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        return self.processes.gather(value)

    def barrier(self) -> None:
        self.processes.barrier()

    def shutdown(self) -> None:
        self.processes.shutdown()
