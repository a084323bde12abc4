"""What does not go together: engines, optimizers, adapters, precision. The one place that says so, and why.

Each refusal is one sentence that names the keys, the reason and the way out.
"""

from __future__ import annotations

from m4train.config import ENGINES, OPTIMIZERS, Config, optimizer_kind
from m4train.config.deepspeed import check_deepspeed_file
from m4train.config.require import at_least, one_of, require


def check_combinations(config: Config) -> None:
    """Refuses with ConfigError what the engine of a run cannot do, or one choice with another."""
    _check_engine(config)
    _check_launch(config.launch.processes, config.engine.name)
    _check_choices(config)


def why_not(engine: str, optimizer: str, adapter: str) -> str | None:
    """The reason in one sentence why the three cannot work together, with the way out; None if they do.

    No adapter changes what an engine can do to an optimizer; 4-bit weights (qlora) are frozen and stay whole under fsdp2.
    """
    kind = optimizer_kind(optimizer)
    if kind.engines is None or engine in kind.engines:
        return None
    *others, last = (f"engine={name}" if not n else name for n, name in enumerate(kind.engines))
    return (
        f"optimizer.name={optimizer} cannot work with engine.name={engine}: {kind.why_not}; choose {', '.join(others)} or "
        f"{last}, or optimizer=adamw."
    )


def _check_engine(config: Config) -> None:
    engine = config.engine
    one_of("engine.name", engine.name, tuple(ENGINES))
    zero = engine.name.startswith("zero")
    require(
        not engine.offload or zero or engine.name == "fsdp2",
        f"engine.offload is true, but engine.name={engine.name} shards nothing: choose fsdp2 or zero1 to zero3.",
    )
    require(
        not engine.shard_within_node or engine.name == "fsdp2",
        f"engine.shard_within_node is true, but engine.name is {engine.name}: it is a setting of fsdp2.",
    )
    one_of("engine.checkpoint", engine.checkpoint, ("portable", "native"))
    require(
        engine.checkpoint == "portable" or zero,
        f"engine.checkpoint is native, but engine.name is {engine.name}, whose checkpoints are portable as they are: leave "
        "it out.",
    )
    require(
        engine.deepspeed is None or zero,
        f"engine.deepspeed is {engine.deepspeed}, but engine.name is {engine.name}: choose zero1, zero2 or zero3.",
    )
    if engine.deepspeed is not None:
        check_deepspeed_file(config)


def _check_launch(processes: int | None, engine: str) -> None:
    if processes is None:
        return
    at_least("launch.processes", processes, 1)
    require(
        processes == 1 or engine != "single",
        f"launch.processes is {processes}, but engine.name is single, which runs on one: choose engine=ddp, fsdp2 or "
        "zero1 to zero3.",
    )


def _check_choices(config: Config) -> None:
    """What one engine, optimizer or adapter cannot do with another, each with its reason."""
    engine, optimizer, adapter = config.engine.name, config.optimizer.name, config.adapter.kind
    require(
        optimizer in OPTIMIZERS or all(optimizer.partition(":")),
        f"optimizer.name is {optimizer!r}, but must be one of {', '.join(OPTIMIZERS)}, or a class as package.module:Class.",
    )
    reason = why_not(engine, optimizer, adapter)
    require(reason is None, reason or "")
    require(
        not (config.trainer.compile is True and engine == "zero3"),
        "trainer.compile is true, but engine.name=zero3 gathers parameters by hooks inside the blocks, which cannot be "
        "compiled: choose engine=fsdp2, or trainer.compile=auto.",
    )
    require(
        not (optimizer_kind(optimizer).whole_matrices and config.engine.offload),
        f"optimizer.name is {optimizer}, but engine.offload keeps shards in CPU memory, where whole matrices would have to be put "
        "together: choose engine.offload=false, or optimizer=adamw.",
    )
    if config.freeze.new_rows_from is not None:
        at_least("freeze.new_rows_from", config.freeze.new_rows_from, 1)
    require(
        config.freeze.frozen_dtype in (None, "bf16"),
        f"freeze.frozen_dtype is {config.freeze.frozen_dtype!r}, but must be bf16 or null.",
    )
    require(
        config.freeze.frozen_dtype is None or config.trainer.precision in ("bf16", "auto"),
        f"freeze.frozen_dtype is bf16, but trainer.precision is {config.trainer.precision}: set trainer.precision=bf16, or "
        "frozen_dtype to null.",
    )
    require(
        adapter != "none" or config.adapter.start_from is None,
        f"adapter.start_from is {config.adapter.start_from}, but adapter.kind is none: choose adapter=lora, dora or qlora.",
    )
    require(
        adapter != "none" or not config.adapter.modules_to_save,
        f"adapter.modules_to_save is {config.adapter.modules_to_save}, but adapter.kind is none: choose adapter=lora, dora or "
        "qlora, or say by freeze.rules what trains.",
    )
    beams = config.evaluation.decoding.num_beams
    require(
        beams == 1 or engine not in ("fsdp2", "zero3"),
        f"evaluation.decoding.num_beams is {beams}, but under engine.name={engine} the ranks share the weights and must end "
        "together, which beams do not: choose engine=single or ddp, or num_beams=1.",
    )
    require(
        adapter != "qlora" or bool(config.adapter.quantize),
        "adapter.quantize is empty, but adapter.kind is qlora: name the parts to store in 4 bits, such as [text].",
    )
