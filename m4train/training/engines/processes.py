"""The processes of a run: how they find each other, and how they agree without waiting for a device."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m4train.errors import ConfigError
from m4train.launching import check_devices

_LOG = logging.getLogger(__name__)
_ELSEWHERE = "192.0.2.1"  # an address that nobody has (RFC 5737): whatever leads there leads out


class Processes:
    """The process group of a run, over gloo on CPUs and NCCL on GPUs, from the environment torchrun or SLURM sets.

    Without such an environment it is a group of one. `control_group` is a gloo group for host-side agreement.
    Collectives fail after `timeout`. A group that already exists (a test, a notebook) is used and left alone.
    """

    def __init__(self, timeout: timedelta) -> None:
        _complete_environment()
        _lead_gloo_out()
        local_rank = int(os.environ["LOCAL_RANK"])
        check_devices(int(os.environ["LOCAL_WORLD_SIZE"]))
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        self._owned = not dist.is_initialized()
        if self._owned:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self.control_group = dist.new_group(backend="gloo", timeout=timeout)
        self.checkpoint_group = dist.new_group(backend="gloo", timeout=timeout)

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks of a tensor (...) on the device of the run, or on the CPU."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def agree(self, values: Sequence[int]) -> list[int]:
        """Sums over ranks of host integers; waits for the other hosts, not for the device."""
        tensor = torch.tensor([int(value) for value in values], dtype=torch.int64)
        dist.all_reduce(tensor, group=self.control_group)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value of a picklable object."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable object, on rank 0; an empty list on the others."""
        values = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.control_group)
        return values or []

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def shutdown(self) -> None:
        """Waits for everybody, then ends the group, so that no rank is seen as lost by another."""
        if self._owned and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


@atexit.register
def let_gloo_finish(patience: float = 10.0) -> None:
    """Lets go of the interpreter until the threads of gloo sleep, at most `patience` seconds.

    After the caller of a collective has gone on, such a thread still drops its tensors, and needs the interpreter for
    it. Python before 3.14 ends a thread that asks while the interpreter itself ends, which C++ answers with "terminate
    called without an active exception" and exit code 134 (pytorch/pytorch#38228).
    """
    end, quiet = time.monotonic() + patience, 0
    while quiet < 2 and time.monotonic() < end:
        time.sleep(0.01)  # twice the switch interval, so that whoever waits for the interpreter has had it
        quiet = 0 if _gloo_at_work() else quiet + 1


def _gloo_at_work() -> bool:
    """Whether a thread of this process that runs collectives over gloo is awake; False if there is no /proc."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # it has ended meanwhile
            continue
        if name.endswith("(pt_gloo_runloop") and rest.split()[0] != "S":
            return True
    return False


def _lead_gloo_out() -> None:
    """Names gloo an interface if this node's own name stands for its loopback, as Debian's installer writes it: gloo would send
    the ranks of other nodes there. A value that is set stays; NCCL looks for interfaces by itself."""
    several = int(os.environ["WORLD_SIZE"]) > int(os.environ["LOCAL_WORLD_SIZE"])
    if not several or "GLOO_SOCKET_IFNAME" in os.environ or not _own_address().startswith("127."):
        return
    import psutil

    addresses = [_address_towards(host) for host in (os.environ["MASTER_ADDR"], _ELSEWHERE)]
    outer = next((found for found in addresses if found and not found.startswith("127.")), None)
    names = [name for name, held in psutil.net_if_addrs().items() if outer in (each.address for each in held)]
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]
        return
    _LOG.warning(
        "The name of this node, %s, stands for %s, where other nodes cannot reach it, and no way out was found: set "
        "GLOO_SOCKET_IFNAME to the network interface that the nodes share.",
        socket.gethostname(),
        _own_address(),
    )


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # a name without an address: gloo takes the loopback then
        return "127.0.0.1"


def _address_towards(host: str) -> str | None:
    """The address of this node from which packets to `host` would leave; none is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def _complete_environment() -> None:
    """Fills in a group of one if no launcher has set the environment."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update({**alone, "MASTER_PORT": str(probe.getsockname()[1])})
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE is set to {os.environ['WORLD_SIZE']}, but {name} is not: set it too, or unset WORLD_SIZE to let "
                "launch.processes start the processes of this machine."
            )
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
