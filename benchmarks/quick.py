"""The ratios of the other benchmarks to what a user would pick instead, at small sizes: about a minute of a fast core.

    make bench-quick        # or PYTHONPATH=. python benchmarks/quick.py [--seconds 150]

All in one process, which imports everything once. What no longer fits into the seconds is left out and named; a part that fails
does not keep the others from being measured, and gives the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable

from benchmarks import data, images, packing, training

# name -> what prints its ratios, and about how many seconds a slow core needs, what matters most first
PARTS: dict[str, tuple[Callable[[], None], float]] = {
    "training": (
        lambda: training.main(["--model", "tiny", "--pairs", "3", "--no-memory"]),
        25,
    ),
    "data": (lambda: data.main(["--quick"]), 45),
    "images": (
        lambda: images.main(
            ["--seconds", "0.5", "--sizes", "photo", "--processors", "Idefics2", "Idefics3 whole", "SmolVLM 512"]
        ),
        15,
    ),
    "packing": (lambda: packing.main(["--quick"]), 15),
    "memory": (
        lambda: training.main(["--model", "tiny", "--pairs", "1", "--kinds", "conversations"]),
        40,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="of the clock, after which no part is begun")
    ends = time.monotonic() + parser.parse_args(arguments).seconds
    failed = False
    for name, (measure, needed) in PARTS.items():
        left = ends - time.monotonic()
        if needed > left:
            print(f"{name}: left out, since it may need {needed:.0f} s and {max(0.0, left):.0f} s are left", flush=True)
            continue
        print(f"-- {name}", flush=True)
        begun, worked = time.monotonic(), time.process_time()
        try:
            measure()
        except Exception:
            failed = True
            traceback.print_exc()
        print(
            f"   ({time.monotonic() - begun:.0f} s, of them {time.process_time() - worked:.0f} s of a core)", flush=True
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
