"""The tables and sentences of `m4train estimate`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from m4train.estimation.changes import Change
from m4train.estimation.needs import Estimate
from m4train.estimation.subject import Speed, Subject
from m4train.gpus import GPUS

_GIB = 2.0**30
_MEANING = {
    "parameters": "weights as they are stored",
    "buffers": "constants of the model",
    "master copy": "what trains once more, flat, for DeepSpeed's optimizer",
    "frames": "tokens and pixels of the batch",
    "gradients": "fp32, of what trains",
    "optimizer": "moments",
    "activations": "kept for the backward pass, pixels in fp32, logits of a chunk",
    "operations": "results that the backward pass holds for a moment",
    "gathered": "whole weights of what is computed now and next",
    "buckets": "gradients and weights on their way between ranks",
}


def as_report(found: Estimate) -> dict[str, Any]:
    """The estimate as JSON values; bytes and seconds."""
    memory = found.memory
    return {
        "parameters": found.sizes.parameters,
        "trained": found.sizes.trained,
        "memory": {
            **memory.components,
            "host": memory.host,
            "low": memory.low,
            "expected": memory.expected,
            "high": memory.high,
        },
        "compiled": found.subject.compiled,
        "gpu": None if found.subject.gpu is None else GPUS[found.subject.gpu]._asdict(),
        "capacity": found.capacity,
        "fits": found.fits,
        "frames_per_micro_batch": found.frames,
        "flops_per_step": found.step_flops,
        "tokens": found.tokens,
        "speed": [vars(speed) for speed in found.speeds],
        "checkpoint_bytes": found.checkpoint_bytes,
        "checkpoint_seconds": found.checkpoint_seconds,
        "whole_weights": found.sizes.whole_weights,
        "changes": [_as_values(change) for change in found.changes],
        "what_if": [_as_values(change) for change in found.variants],
        "limits": found.limits,
    }


def _as_values(change: Change) -> dict[str, Any]:
    memory = change.memory
    return {"overrides": list(change.overrides), "expected": memory.expected, "host": memory.host, "fits": change.fits}


def estimate_tables(found: Estimate) -> list[Any]:
    """What is printed, in order."""
    size, memory = found.sizes, found.memory
    table = Table("memory of one rank", "GiB", "what it is", box=None)
    for name, value in sorted(memory.components.items(), key=lambda item: -item[1]):
        if value:
            table.add_row(name, f"{value / _GIB:.2f}", _MEANING[name])
    table.add_row("low / expected / high", _three(memory), "with what the device's libraries and allocator take")
    if memory.host:
        table.add_row("CPU memory", f"{memory.host / _GIB:.2f}", "what engine.offload keeps there")
    lines: list[Any] = [
        f"model: {_billions(size.parameters)} parameters, of which {_billions(size.trained)} train",
        table,
        _verdict(found),
        *_asides(found.subject),
    ]
    if found.speeds:
        lines.append(_speeds(found.speeds))
    lines.append(
        f"whole run: {found.tokens / 1e9:.3g} B tokens; a checkpoint is {found.checkpoint_bytes / _GIB:.1f} GiB, about "
        f"{found.checkpoint_seconds:.0f} s at 1 GB/s per node"
    )
    if found.variants:
        lines.append(_what_if(found))
    if found.limits:
        most = ", ".join(f"{key}={value}" for key, value in found.limits.items())
        lines.append(f"the most that fits, each by itself: {most}")
    return [*lines, *_ways_out(found)]


def _asides(subject: Subject) -> list[str]:
    lines = []
    if subject.gpu is not None:
        flops, memory, bandwidth = GPUS[subject.gpu]
        sheet = f"{flops / 1e12:,.0f} TFLOP/s in half precision, {memory / _GIB:.1f} GiB at {bandwidth / 1e12:.2f} TB/s"
        lines.append(f"{subject.gpu}, by its data sheet: {sheet}")
    if subject.compiled:
        again = subject.config.trainer.gradient_checkpointing
        less = "0 to 3 % less with gradient checkpointing" if again else "8 to 12 % less"
        lines.append(f"trainer.compile: this is of the code as it is written; compiled, a small model needed {less}")
    return lines


def _what_if(found: Estimate) -> Table:
    table = Table("by itself", "GiB expected", "difference", "", box=None)
    for change in found.variants:
        off = (change.memory.expected - found.memory.expected) / _GIB
        fits = "" if found.capacity is None or change.fits else "does not fit"
        table.add_row(" ".join(change.overrides), f"{change.memory.expected / _GIB:.2f}", f"{off:+.2f}", fits)
    return table


def _three(memory: Any) -> str:
    return " / ".join(f"{value / _GIB:.1f}" for value in (memory.low, memory.expected, memory.high))


def _billions(count: int) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _verdict(found: Estimate) -> str:
    expected, subject = found.memory.expected / _GIB, found.subject
    where = f"{subject.ranks} x {subject.gpu or 'CPU'}"
    if found.capacity is None:
        return f"{where}: {expected:.1f} GiB per rank; name a GPU (--gpu h100) to learn whether it fits, and how long it takes"
    capacity = found.capacity / _GIB
    if not found.fits:
        return f"{where}: does NOT fit: {expected:.1f} GiB are expected of {capacity:.1f} GiB"
    tight = "" if found.memory.high <= found.capacity else ", but tightly: the high figure is above it"
    return f"{where}: fits: {expected:.1f} GiB are expected of {capacity:.1f} GiB{tight}"


def _speeds(speeds: list[Speed]) -> Table:
    table = Table(
        "share of the peak (MFU)", "s per step", "tokens/s", "frames/s", "days", "CPU cores for data", box=None
    )
    for speed in speeds:
        table.add_row(
            "measured" if speed.mfu is None else f"{speed.mfu:.0%}",
            f"{speed.step_seconds:.3g}",
            f"{speed.tokens_per_second:,.0f}",
            _rate(speed.frames_per_second),
            f"{speed.days:.3g}",
            _rate(speed.cores),
        )
    return table


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.5 else f"{value:.2g}" if value >= 0.01 else "under 0.01"


def _ways_out(found: Estimate) -> list[str]:
    if not found.changes:
        return [] if found.fits else ["No change of a key makes it fit: use more GPUs (--ranks N) or larger ones."]
    first = "It would fit with any one of" if len(found.changes) > 1 else "It would fit with"
    if not found.changes[0].fits:
        first = "It would not fit even with"
    rows = [
        f"  {' '.join(change.overrides)}: {change.memory.expected / _GIB:.1f} GiB expected" for change in found.changes
    ]
    return [f"{first}:", *rows]
