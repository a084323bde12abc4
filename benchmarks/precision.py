"""fp32 against bf16 autocast: one forward and backward pass of an experiment's first batch, in turn.

python benchmarks/precision.py [experiment=NAME] [overrides]
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from m4train import build
from m4train.config.compose import load_config

ROUNDS = 15


def main(overrides: list[str]) -> None:
    config = load_config(overrides or ["experiment=digits_pretrain"])
    config.data.num_workers = 0
    build.prepare_data(config.data)
    processor = build.build_processor(config)
    model = build.build_model(config, processor)
    batch = next(iter(build.build_data(config, processor, 0, 1).steps(None))).micro_batches[0]
    print(
        f"{batch.tokens} tokens, {len(batch.segments)} documents, {batch.images.count} frames, {torch.get_num_threads()} threads"
    )
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(ROUNDS):
        for name, taken in times.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                output = model(batch)
            output.loss.backward()
            taken.append(time.perf_counter() - started)
    for name, taken in times.items():
        print(f"{name}: median {1000 * statistics.median(taken):.0f} ms, best {1000 * min(taken):.0f} ms")
    ratio = statistics.median(b / f for f, b in zip(times["fp32"], times["bf16"]))
    print(f"bf16 takes {ratio:.2f} times as long as fp32 (median of {ROUNDS} pairs)")


if __name__ == "__main__":
    main(sys.argv[1:])
