"""`m4train launch check`: checks, before hours of queueing, what runs of several processes often fail on."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import m4train
from m4train.commands.pairs import pair_speeds, slow_pairs
from m4train.config import Config
from m4train.training.engines.processes import Processes

_MEGABYTES = 64  # sent around and written to measure speed
_FREE_GB = 2.0  # below that not even a small checkpoint fits
_CLOCK_SECONDS = 5.0  # more, and logs of nodes cannot be read side by side
_PATIENCE = 20.0  # seconds after which a file of another node must be visible


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    fine: bool
    text: str


def preflight(config: Config) -> int:
    """Checks the processes this one belongs to, and prints a table on rank 0; returns 0, or 1 if a check failed."""
    processes = Processes(timedelta(seconds=300))
    facts = _gather(_facts(processes))
    findings = [_versions(facts), _devices(facts), _clock(facts), _all_reduce(processes)]
    findings += [*_pairs(processes), *_disk(Path(config.run_dir), processes)]
    failed = processes.agree([sum(not finding.fine for finding in findings)])[0]
    if processes.rank == 0:
        for finding in findings:
            print(f"{'ok  ' if finding.fine else 'FAIL'}  {finding.name:<12} {finding.text}", flush=True)
    processes.shutdown()
    return 1 if failed else 0


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _gather(value: Any) -> list[Any]:
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def _facts(processes: Processes) -> dict[str, Any]:
    """What this rank says of itself; the clock is read by all at the same moment, right after a barrier."""
    device = "cpu"
    if processes.device.type == "cuda":
        properties = torch.cuda.get_device_properties(processes.device)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    versions = {"m4train": m4train.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if processes.device.type == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    processes.barrier()
    return {"host": _host(), "device": device, "versions": versions, "clock": time.time()}


def _versions(facts: list[dict[str, Any]]) -> Finding:
    first = facts[0]["versions"]
    text = ", ".join(f"{name} {version}" for name, version in first.items())
    others = [f"rank {rank} on {fact['host']} has {fact['versions']}" for rank, fact in enumerate(facts)]
    differing = [other for other, fact in zip(others, facts, strict=True) if fact["versions"] != first]
    return Finding("versions", not differing, "; but ".join([text, *differing[:2]]))


def _devices(facts: list[dict[str, Any]]) -> Finding:
    kinds = sorted({fact["device"] for fact in facts})
    hosts = len({fact["host"] for fact in facts})
    text = f"{len(facts)} processes on {hosts} host{'s' if hosts > 1 else ''}: {'; '.join(kinds)}"
    return Finding("devices", len(kinds) == 1, text)


def _clock(facts: list[dict[str, Any]]) -> Finding:
    clocks = [fact["clock"] for fact in facts]
    apart = max(clocks) - min(clocks)
    return Finding("clock", apart < _CLOCK_SECONDS, f"at most {apart:.2f} s apart")


def _all_reduce(processes: Processes) -> Finding:
    """The sum of what all ranks hold, and how fast a larger one is made."""
    world_size = processes.world_size
    total = processes.reduce(torch.tensor([processes.rank + 1.0], device=processes.device)).item()
    block = torch.ones(_MEGABYTES * 2**18, device=processes.device)
    processes.reduce(block)  # connections are made by the first
    began = time.perf_counter()
    right = processes.reduce(block)[-1].item() == world_size and total == world_size * (world_size + 1) / 2
    speed = _MEGABYTES / 1024 / (time.perf_counter() - began)
    backend = "nccl" if processes.device.type == "cuda" else "gloo"
    text = f"{backend}, {_MEGABYTES} MiB at {speed:.2f} GiB/s" if right else f"{backend} gives a wrong sum"
    return Finding("all-reduce", right, text)


def _pairs(processes: Processes) -> list[Finding]:
    """How fast each pair of nodes exchanges a block; nothing with one node."""
    speeds = pair_speeds(processes, _host())
    if not speeds:
        return []
    slow = [f"{'-'.join(pair)} {speeds[pair]:.2f}" for pair in slow_pairs(speeds)]
    text = f"{len(speeds)} pairs of nodes, {min(speeds.values()):.2f} to {max(speeds.values()):.2f} GiB/s"
    return [Finding("pairs", not slow, "; slow: ".join([text, *slow]))]


def _disk(run_dir: Path, processes: Processes) -> list[Finding]:
    """Rank 0 writes into run_dir, and every rank must read there what it wrote."""
    token, problem, speed = processes.broadcast(uuid.uuid4().hex), None, 0.0
    probe, file = run_dir / f".preflight-{token}", run_dir / f".preflight-{token}-data"
    if processes.rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            speed = _write(file)
            probe.write_text(token)
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
    problem = processes.broadcast(problem)
    if problem is not None:
        return [Finding("run_dir", False, f"{run_dir} cannot be written: {problem}")]
    seen = _visible(probe, token)
    hosts = [host for host, there in _gather((socket.gethostname(), seen)) if not there]
    if processes.rank == 0:
        for path in (probe, file):
            path.unlink(missing_ok=True)
    free = shutil.disk_usage(run_dir).free / 2**30 if seen else 0.0
    where = (
        "every rank sees what rank 0 writes" if not hosts else f"not the same folder on {', '.join(sorted(set(hosts)))}"
    )
    written = f"{run_dir}: {free:.0f} GiB free, written at {speed:.0f} MiB/s"
    return [Finding("run_dir", free >= _FREE_GB or processes.rank > 0, written), Finding("shared", not hosts, where)]


def _write(file: Path) -> float:
    """Writes and flushes a file; returns MiB a second."""
    data = os.urandom(2**20)
    began = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(_MEGABYTES):
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return _MEGABYTES / (time.perf_counter() - began)


def _visible(probe: Path, token: str) -> bool:
    """Whether this rank reads the token; file systems over a network may show a new file a little later."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if probe.exists() and probe.read_text() == token:
            return True
        time.sleep(0.1)
    return False
