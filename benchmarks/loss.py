"""Time and peak memory of loss and gradients from hidden states: m4train's chunked loss, torch's own, Liger, whole logits.

python benchmarks/loss.py [TOKENS SIZE VOCABULARY [fp32|bf16]]
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4train.models.loss import LMHead, token_loss

ROUNDS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def forms(tokens: int, size: int, vocabulary: int, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> what computes the loss of the same random tokens."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[precision]
    head = LMHead(size, vocabulary).to(DEVICE, dtype)
    hidden = torch.randn(tokens, size, generator=generator).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)

    def ours(kind: str) -> Callable[[], Tensor]:
        return lambda: token_loss(head, hidden, targets, kind=kind)[0]

    def whole() -> Tensor:
        return F.cross_entropy(F.linear(hidden, head.weight).float(), targets, reduction="sum")

    made = {"m4train, chunked": ours("chunked"), "whole logits": whole}
    if hasattr(nn, "LinearCrossEntropyOptions"):
        options = nn.LinearCrossEntropyOptions()
        made["torch, a loss per token (model.loss=torch)"] = ours("torch")
        made["torch, sum only"] = lambda: F.linear_cross_entropy(
            hidden, head.weight, targets, reduction="sum", options=options
        )
    if DEVICE == "cuda" and find_spec("liger_kernel"):
        made["Liger, a loss per token (model.loss=liger)"] = ours("liger")
    return made


def seconds(form: Callable[[], Tensor]) -> float:
    """One forward and backward pass."""
    started = time.perf_counter()
    form().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(sizes: tuple[int, int, int, str], name: str) -> float:
    """MiB that the first pass adds to what its inputs take; to be asked in a fresh process."""
    form = forms(*sizes)[name]
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(form)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = resident("VmRSS")
    seconds(form)
    return resident("VmHWM") - before


def resident(kind: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def main(tokens: int = 1024, size: int = 576, vocabulary: int = 49280, precision: str = "fp32") -> None:
    sizes = (tokens, size, vocabulary, precision)
    made = forms(*sizes)
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, form in made.items():
            taken[name].append(seconds(form))
    print(f"{tokens} tokens of {size}, {vocabulary} ids, {precision} on {DEVICE}, {torch.get_num_threads()} threads")
    for name, times in taken.items():
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            memory = fresh.apply(peak, (sizes, name))
        print(f"{name:<44} {1000 * statistics.median(times):8.1f} ms {memory:8.0f} MiB")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*(int(value) for value in given[:3]), *given[3:])  # type: ignore[misc]
