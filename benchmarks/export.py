"""Peak memory of `m4train export` against the size of the model: python benchmarks/export.py [LAYERS]

Each export runs in a process of its own. Counted is anonymous memory, which the system cannot take back, at its largest, less
what importing takes; pages of files that are mapped (the export, when it is read again) are not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def prepare(run_dir: Path, layers: int) -> int:
    """Leaves a checkpoint with optimizer state of a model of some 100s of MB in `run_dir`; returns the bytes of its weights."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.checkpoints import saved_run

    text = f"model.architecture.text_config={{hidden_size: 768, intermediate_size: 3072, num_hidden_layers: {layers}, \
num_attention_heads: 12, num_key_value_heads: 12}}"
    _, model = saved_run(run_dir, text)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def measure(arguments: list[str]) -> None:
    """Runs one export in this process and prints its largest resident set in bytes, and seconds."""
    import m4train.commands.export  # noqa: F401  what every export imports is not what it needs
    from m4train.cli import main

    started, imported, peak, done = time.perf_counter(), _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert main(["export", *arguments]) == 0
    done.set()
    watcher.join()
    print(peak - imported, time.perf_counter() - started)


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def run(*arguments: str) -> tuple[float, float]:
    command = [sys.executable, __file__, "--measure", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, seconds = done.stdout.split()[-2:]
    return float(peak), float(seconds)


def main(layers: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--prepare", scratch, str(layers)]
        size = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])
        print(f"weights {size / 1e6:.0f} MB")
        for name, options in (
            ("files of 50 MB, not verified", ["export.max_shard_size=50MB", "export.verify=false"]),
            ("one file, not verified", ["export.verify=false"]),
            ("files of 50 MB, verified", ["export.max_shard_size=50MB"]),
        ):
            peak, seconds = run(f"run_dir={scratch}", *options)
            print(f"{name}: {peak / 1e6:.0f} MB above imports, {peak / size:.2f} of the weights, {seconds:.1f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    elif sys.argv[1:2] == ["--prepare"]:
        print(prepare(Path(sys.argv[2]), int(sys.argv[3])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
