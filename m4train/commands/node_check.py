"""`m4train launch node`: whether this machine alone can train: GPUs, shared memory, data and indexes.

A job runs it on every node before the first step, into one folder, as processes of one group, which then also measure how fast
each pair of nodes is; then `--judge FOLDER` compares what the nodes found and names the bad ones, and loads no torch for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from m4train.commands.pairs import slow_nodes, slow_pairs
from m4train.config import Config
from m4train.errors import ConfigError, DataError

_SHM_MIB = 32  # of /dev/shm for each process that reads data
_QUERY: tuple[str, ...] = (
    "memory.total",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)
_QUERY += ("clocks_throttle_reasons.hw_thermal_slowdown",)
_PAIRS = "pairs"  # the speeds of pairs, next to what each node found
_PATIENCE = 120.0  # seconds that nodes wait for each other before their pairs are given up
# What a program did wrong, or was ended by, and not the card: out of bounds, a page fault, stopped, cleaned up after.
_XID_OF_PROGRAMS = ("13", "31", "43", "45")
_ALIKE = ("gpus", "memory", "driver", "index")  # what all nodes must have the same of


def check_node(config: Config, out: str | Path | None, judge: str | Path | None, nodes: str | None = None) -> int:
    """Checks this node, prints a line for each problem, and writes what it found into the folder `out`; with `judge`, compares
    what is in that folder instead and writes the names of bad nodes there, of `nodes` (with commas) also those of which nothing
    is there. Returns 0, or 1 if something is wrong."""
    if judge is not None:
        return _judge(Path(judge), (nodes or "").split(",") if nodes else [])
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found, problems = _gpus(config), []
    problems += found.pop("problems")
    problems += [*_xid(), *_shared_memory(config)]
    found["index"], unread = _data(config)
    problems += unread
    if out is not None:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        aside = out / f".{name}"
        aside.write_text(json.dumps({"node": name, "problems": problems, **found}), encoding="utf-8")
        aside.rename(out / f"{name}.json")
    print(*(f"node {name}: {problem}" for problem in problems or ["fine"]), sep="\n", flush=True)
    if out is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _measure_pairs(name, Path(out))
    return 1 if problems and out is None else 0


def _measure_pairs(name: str, out: Path) -> None:
    """Writes how fast the nodes of this group exchange data; if that cannot be measured, says why and leaves it to training."""
    from m4train.commands.pairs import pair_speeds
    from m4train.training.engines.processes import Processes

    try:
        processes = Processes(timedelta(seconds=_PATIENCE))
        speeds = pair_speeds(processes, name)
        if processes.rank == 0:
            aside = out / ".pairs"
            aside.write_text(json.dumps([[*pair, speed] for pair, speed in speeds.items()]), encoding="utf-8")
            aside.rename(out / _PAIRS)
            print(f"{len(speeds)} pairs of nodes, {min(speeds.values()):.2f} to {max(speeds.values()):.2f} GiB/s")
        processes.shutdown()
    except (RuntimeError, OSError) as error:
        print(f"node {name}: the speed of pairs was not measured ({str(error).splitlines()[0]})", flush=True)


def _judge(folder: Path, expected: list[str]) -> int:
    nodes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    bad = {node["node"]: list(node["problems"]) for node in nodes if node["problems"]}
    if not nodes:
        print("no node could say how it is", flush=True)  # which speaks against none of them
    for name in set(expected) - {node["node"] for node in nodes} if nodes else ():
        bad[name] = ["it could not be checked, as its log says"]
    for key in _ALIKE:
        counted = Counter(json.dumps(node[key]) for node in nodes)
        usual = counted.most_common(1)[0][0] if counted else ""
        for node in nodes:
            if json.dumps(node[key]) != usual:
                bad.setdefault(node["node"], []).append(
                    f"{key} is {node[key]}, but most nodes have {json.loads(usual)}"
                )
    measured = folder / _PAIRS
    speeds = (
        {(one, other): speed for one, other, speed in json.loads(measured.read_text())} if measured.exists() else {}
    )
    for name, others in slow_nodes(slow := slow_pairs(speeds)).items():
        there = ", ".join(f"{other} {speeds[min(name, other), max(name, other)]:.2f}" for other in others)
        rest = [speed for pair, speed in speeds.items() if pair not in slow]
        bad.setdefault(name, []).append(f"slow to {there} GiB/s, other pairs reach {max(rest):.2f}")
    for name, problems in bad.items():
        print(f"bad node {name}: {'; '.join(problems)}", flush=True)
    (folder / "bad").write_text("".join(f"{name}\n" for name in bad), encoding="utf-8")
    return 1 if bad else 0


def _gpus(config: Config) -> dict[str, Any]:
    """Count, memory (MiB) and driver of the GPUs, and what is wrong with them; without nvidia-smi this is a machine without."""
    asked = config.launch.processes or 1
    if shutil.which("nvidia-smi") is None:
        return {"gpus": 0, "memory": [], "driver": [], "problems": []}
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = " ".join((done.stderr or done.stdout).split())
        return {"gpus": 0, "memory": [], "driver": [], "problems": [f"nvidia-smi fails: {why}"]}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    problems = []
    if len(rows) < asked:
        problems.append(f"{len(rows)} GPUs, but launch.processes asks for {asked}")
    for number, row in enumerate(rows):
        if len(row) < len(_QUERY):
            continue
        if row[2].isdigit() and int(row[2]):
            problems.append(f"GPU {number} has {row[2]} uncorrected ECC errors: reset it")
        if "Active" in (row[3], row[4]):
            problems.append(f"GPU {number} is slowed down by its hardware (heat or power)")
    kinds = [sorted({row[place] for row in rows if len(row) > place}) for place in (0, 1)]
    return {"gpus": len(rows), "memory": kinds[0], "driver": kinds[1], "problems": problems}


def _xid() -> list[str]:
    """Errors that the driver of the GPUs wrote into the kernel's log, as far as this user may read it."""
    if shutil.which("dmesg") is None or shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["dmesg"], capture_output=True, text=True)
    found = ((line, re.search(r"NVRM: Xid \(.*?\): (\d+)", line)) for line in done.stdout.splitlines())
    lines = [line for line, number in found if number and number[1] not in _XID_OF_PROGRAMS]
    return [f"{len(lines)} Xid errors of the GPU driver, the last: {lines[-1].strip()}"] if lines else []


def _shared_memory(config: Config, folder: str = "/dev/shm") -> list[str]:
    if not Path(folder).is_dir():
        return []
    free = shutil.disk_usage(folder).free / 2**20
    needed = _SHM_MIB * max(1, config.data.num_workers) * (config.launch.processes or 1)
    return [f"{free:.0f} MiB are free in {folder}, but the readers of data need {needed}"] if free < needed else []


def _data(config: Config) -> tuple[str | None, list[str]]:
    """A digest of the indexes that are there, and the sources that cannot be found from here."""
    if config.data.prepare is not None and not Path(config.data.root).is_dir():
        return None, []  # it is made when training starts
    from m4train.data.index.shard_index import index_path
    from m4train.data.source import shards_of

    digest, problems = hashlib.sha256(), []
    for name, source in config.data.sources.items():
        try:
            paths = [index_path(shard, config.data.index_dir) for shard in shards_of(name, source)]
        except (ConfigError, DataError, OSError) as error:
            problems.append(f"data.sources.{name} cannot be reached ({error})")
            continue
        for path in paths:
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16], problems
