"""Seconds from `m4train train` to the first optimizer step with a warm index, and what they go into.

    PYTHONPATH=. python benchmarks/startup.py [--rounds 3] [--before FOLDER] [--imports]

One process and two (engine=ddp), the digits and their tiny model. `--before`: another checkout of m4train, in turns with this one.
Processor time is that of all processes of the command until then. "torch alone" is a script of a few lines that does with torch what
a run cannot do without: import it, a worker of torch's DataLoader, an optimizer, one step; under torchrun for two processes, in DDP.
`--imports`: what importing takes, by package.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

HERE = Path(__file__).parents[1]
WAYS = {"1 process": [], "2 processes": ["engine=ddp", "launch.processes=2", "trainer.micro_batch_size=2"]}
PARTS = re.compile(r"([a-z ]+) (\d+\.\d)")


ALONE = """
import os, sys, torch
from torch.utils.data import DataLoader

class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, number): return torch.ones(8)

if __name__ == "__main__":
    model = torch.nn.Linear(8, 8)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = next(iter(DataLoader(Data(), num_workers=1, multiprocessing_context="forkserver")))
    model(batch).sum().backward()
    optimizer.step()
    print("step 1/1", flush=True)
"""


def command(data: Path, run_dir: Path, *more: str) -> list[str]:
    overrides = ["experiment=digits_pretrain", f"data.root={data}", f"run_dir={run_dir}", "logging=none"]
    overrides += ["trainer.max_steps=1", "trainer.eval_every=0", "schedule.warmup_steps=0", *more]
    return ["-m", "m4train", "train", *overrides]


def started(checkout: Path | None, data: Path, more: list[str]) -> tuple[float, float, dict[str, float]]:
    """Seconds and processor seconds until the first step is logged, and those of each part if the checkout names them; without
    a checkout of torch alone."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *command(data, Path(folder) / "run", *more)]
        if checkout is None:
            script = Path(folder) / "alone.py"
            script.write_text(ALONE)
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if more else []
            words, checkout = [sys.executable, *launcher, str(script)], Path(folder)
        environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": f"{data}-compiled"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed packages are: compiled once
        begun = time.perf_counter()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(words, cwd=checkout, env=environment, **pipes)
        seconds, processor, parts = 0.0, 0.0, {}
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("step 1/"):
                seconds, processor = time.perf_counter() - begun, _processor(process.pid)
            if line.startswith("start-up"):
                parts = {name.strip(): float(value) for name, value in PARTS.findall(line.partition(":")[2])}
        assert process.wait() == 0, "".join(said)
        assert seconds, "".join(said)
        return seconds, processor, parts


def _processor(pid: int) -> float:
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, with those of children that have ended
    return total


def imported(module: str) -> Counter[str]:
    """Milliseconds by top-level package that `python -X importtime` gives for a module."""
    code = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(2):  # compiled by the first
            done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=HERE, env=environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    taken: Counter[str] = Counter()
    for line in lines[1:]:
        own, _, name = line.removeprefix("import time:").split("|")
        taken[name.strip().partition(".")[0]] += int(own) / 1000
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--imports", action="store_true")
    options = parser.parse_args()
    if options.imports:
        taken = imported("m4train.commands.train")
        print(f"import m4train.commands.train: {sum(taken.values()):.0f} ms")
        print("".join(f"  {name} {value:.0f} ms\n" for name, value in taken.most_common(12)))
        return
    checkouts: dict[str, Path | None] = {"torch alone": None, "now": HERE}
    if options.before:
        checkouts["before"] = options.before.resolve()
    with tempfile.TemporaryDirectory() as folder:
        for name, checkout in checkouts.items():  # makes the data and their index, which may have another form
            for more in (WAYS[way] for way in options.ways):
                started(checkout, Path(folder) / name, more)
        for way in options.ways:
            found: dict[str, list] = {name: [] for name in checkouts}
            for _ in range(options.rounds):
                for name, checkout in checkouts.items():
                    found[name].append(started(checkout, Path(folder) / name, WAYS[way]))
            for name, rows in found.items():
                seconds, processor = (statistics.median(row[i] for row in rows) for i in (0, 1))
                print(f"{way}, {name}: {seconds:.2f} s, processor {processor:.2f} s", flush=True)
                for part in rows[0][2]:
                    print(f"    {part}: {statistics.median(row[2].get(part, 0.0) for row in rows):.1f} s")


if __name__ == "__main__":
    main()
