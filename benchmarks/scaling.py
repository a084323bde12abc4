"""The arithmetic of docs/scaling.md: Idefics-80B's pretraining on 512 and 1,024 GPUs, as `m4train estimate` sees it.

python benchmarks/scaling.py            # prints the tables
python benchmarks/scaling.py --write    # puts them into docs/scaling.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from m4train.commands.architectures import architecture_of
from m4train.config.compose import load_config
from m4train.estimation.needs import Estimate, estimate
from m4train.estimation.subject import Subject
from m4train.gpus import GPUS

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- made by benchmarks/scaling.py -->", "<!-- end -->"
RANKS, GPU = (512, 1024), "h100"
NODE = 8  # GPUs
NETWORK = 8 * 50e9  # bytes a second of a node: eight ports of 400 Gb/s
PUBLISHED_NETWORK = 340e9 / 8  # the same of the nodes that Idefics-80B was trained on
GIB = 2.0**30


def subject(ranks: int) -> Subject:
    config = load_config(["experiment=idefics/80b_pretrain", "engine=fsdp2", "trainer.global_batch_size=4096"])
    config.model.architecture, config.model.processor = {}, {}
    config.model.pretrained = "HuggingFaceM4/idefics-80b"  # the same shapes, which need no tokenizer
    config.model.vision_pretrained = config.model.text_pretrained = config.model.tokenizer = None
    architecture, stored = architecture_of(config)
    return Subject(config, architecture, stored, ranks, GPU)


def traffic(found: Estimate) -> tuple[float, float]:
    """Bytes that a rank receives in an optimizer step under fsdp2, and seconds at the full speed of its node's network: all
    weights are gathered in half precision for the forward and again for the backward pass of each micro-batch, and the
    gradients of what trains are scattered. What one GPU of a node received goes to the others inside the node."""
    micro = found.subject.config.trainer.global_batch_size / found.subject.ranks
    weights, trained = 2.0 * found.sizes.parameters, 4.0 * found.sizes.trained
    received = 2 * micro * weights + micro * trained
    return received, received / NETWORK


def rows(found: Estimate) -> list[tuple[str, str]]:
    memory, middle, ranks = found.memory, found.speeds[1], found.subject.ranks
    received, seconds = traffic(found)
    passes = found.subject.config.trainer.global_batch_size / ranks  # of one pack each
    most = middle.mfu * middle.step_seconds / seconds  # if a step took no longer than its traffic
    slower = most * PUBLISHED_NETWORK / NETWORK
    return [
        ("packs of 1,024 tokens per rank and step", f"{found.subject.config.trainer.global_batch_size / ranks:g}"),
        ("parameters, of which train", f"{found.sizes.parameters / 1e9:.1f} B, {found.sizes.trained / 1e9:.1f} B"),
        *((f"memory: {name}", f"{size / GIB:.2f} GiB") for name, size in memory.components.items() if size > 1e7),
        (
            "memory, low / expected / high",
            " / ".join(f"{size / GIB:.1f}" for size in (memory.low, memory.expected, memory.high)) + " GiB",
        ),
        ("of a GPU's", f"{GPUS[GPU].memory / GIB:.1f} GiB: {'fits' if found.fits else 'does not fit'}"),
        *(
            (f"seconds per step at an MFU of {speed.mfu:.0%}", f"{speed.step_seconds:.1f}, {speed.days:.1f} days")
            for speed in found.speeds
        ),
        ("received by a rank per step", f"{received / 1e9:,.0f} GB"),
        (
            "seconds of it on the network",
            f"{seconds:.1f}: {'hidden behind' if seconds < middle.step_seconds else 'more than'} the computing of the middle row",
        ),
        ("MFU that is expected; that the network allows at most", f"{min(middle.mfu, most):.0%}; {most:.0%}"),
        (
            "allowed at most by 340 Gb/s per node; with all packs in one pass",
            f"{slower:.0%}; {slower * passes:.0%}",
        ),
        ("tokens a second, all ranks", f"{middle.tokens_per_second:,.0f}"),
        ("images a second, all ranks (at most)", f"{middle.frames_per_second:,.0f}"),
        ("CPU cores for them, per node", f"{middle.cores * NODE / ranks:.1f}"),
        ("size of a checkpoint", f"{found.checkpoint_bytes / 1e9:,.0f} GB"),
        ("seconds to write it, at 1 GB/s per node", f"{found.checkpoint_seconds:.0f}"),
    ]


def table() -> str:
    columns = [rows(estimate(subject(ranks))) for ranks in RANKS]
    lines = [f"| | {' | '.join(f'{ranks:,} x {GPU.upper()}' for ranks in RANKS)} |", "| --- | --- | --- |"]
    lines += [f"| {name} | {one} | {other[1]} |" for (name, one), other in zip(*columns, strict=True)]
    return "\n".join(lines)


def page(text: str, made: str) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
    else:
        print(table())
