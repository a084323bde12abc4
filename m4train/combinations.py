"""Which engine works with which optimizer and adapter: the one place that says so, and why the others do not."""

from __future__ import annotations


def why_not(engine: str, optimizer: str, adapter: str) -> str | None:
    """The reason in one sentence why the three cannot work together, with the way out; None where they do.

    No adapter changes what an engine can do to an optimizer; 4-bit weights (qlora) are frozen and stay whole under fsdp2.
    """
    sharded = engine not in ("single", "ddp")
    if optimizer == "adamw_8bit" and sharded:
        return (
            f"optimizer.name=adamw_8bit cannot work with engine.name={engine}: its block-wise quantised state belongs to "
            "whole tensors, not to shards; choose engine=single or ddp, or optimizer=adamw."
        )
    if optimizer == "muon" and engine.startswith("zero"):
        return (
            f"optimizer.name=muon cannot work with engine.name={engine}: it makes whole matrices orthogonal, and each rank "
            "would hold flat shards; choose engine=single, ddp or fsdp2, or optimizer=adamw."
        )
    return None
