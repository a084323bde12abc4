"""The schema of `conf/`: one dataclass per group, and the checks that need more than one key.

Nothing heavy is imported here: a wrong key or an impossible combination is answered before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from m4train.errors import ConfigError

MODEL_FAMILIES = ("idefics", "idefics2", "idefics3", "smolvlm")
ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
OPTIMIZERS = ("adamw", "adamw_8bit")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
ADAPTERS = ("none", "lora", "dora", "qlora")


@dataclass
class ModelConfig:
    """What is trained. Either `pretrained` (a Hugging Face folder) or `architecture` (fields of config.json)."""

    family: str = "idefics3"  # idefics, idefics2, idefics3, smolvlm
    pretrained: str | None = None  # folder or hub id to start from; null: random weights
    architecture: dict[str, Any] = field(default_factory=dict)  # config.json of a model made from scratch
    processor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json of a model made from scratch
    tokenizer: str | None = None  # folder holding tokenizer.json; null: the one in `pretrained`
    z_loss: float = 0.0


@dataclass
class SourceConfig:
    """One dataset of the mixture."""

    path: str = ""  # shards: a path, a glob, or a brace pattern
    format: str = "canonical"  # how they are laid out, see m4train.data.sources.registry
    weight: float = 1.0  # share of the samples drawn from this source
    loss: str = "auto"  # auto: every text token of documents, assistant answers of conversations; or: all, last_turn


@dataclass
class AugmentConfig:
    """Random changes of the decoded image, drawn from (seed, epoch, sample)."""

    shift_pixels: int = 0  # translate by up to this many pixels of the source image, edges repeated
    rotate_degrees: float = 0.0  # turn about the centre by up to this angle either way, edges repeated


@dataclass
class MixtureConfig:
    """How the samples of several sources are mixed."""

    by: str = "samples"  # what the weights share out: samples, tokens, images
    temperature: float | None = None  # weights are multiplied by size ** (1 / temperature); null: taken as they are
    schedule: dict[int, dict[str, float]] = field(
        default_factory=dict
    )  # weights from a step on, such as {1000: {a: 2}}


@dataclass
class CostConfig:
    """Estimated work of a pack in tokens, by which packs are shared among ranks: tokens + squared x sum of squared segment
    lengths + frame x frames."""

    squared: float = 1e-4  # attention against the rest of a layer: about 1 / (6 x hidden size)
    frame: float = 128.0  # the vision tower on one frame against the text model on one token


@dataclass
class DataConfig:
    root: str = "datasets"  # where `prepare` writes
    prepare: str | None = None  # "package.module:function", called as function(root) when its output is missing
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    index_dir: str | None = None  # null: beside each shard
    auto_index_limit: int = 200_000  # samples; larger datasets need `m4train data index` first
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    sequence_length: int = 1024  # token budget of a pack
    images_per_pack: int = 64  # image budget of a pack, in frames
    packing_pool: int = 64  # documents that packing chooses among
    long_documents: str = "split"  # split (at item borders), drop
    shuffle: bool = True
    shuffle_window: int = 8  # row groups that are mixed with each other, in formats that are read by row group
    epochs: int | None = None  # null: repeat for as long as the run lasts
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    num_workers: int = 2  # processes that read and decode; 0: in the trainer itself
    prefetch_steps: int = 2  # optimizer steps held ready
    max_bad_fraction: float = 0.02  # stop above this share of dropped samples


@dataclass
class FreezeRule:
    """Sets `trainable` for the parameters it matches; later rules win. A rule that matches nothing is an error."""

    part: str | None = None  # vision, connector, text, embeddings, lm_head; null: any
    names: list[str] = field(default_factory=list)  # glob patterns of canonical parameter names; empty: any
    module_types: list[str] = field(default_factory=list)  # class names such as Linear, LayerNorm, RMSNorm; empty: any
    trainable: bool = False


@dataclass
class FreezeConfig:
    rules: list[FreezeRule] = field(default_factory=list)
    frozen_dtype: str | None = None  # bf16: store what does not train in half the memory; null: as it was loaded


@dataclass
class AdapterConfig:
    kind: str = "none"  # none, lora, dora, qlora (lora on a base quantised to 4 bits)
    rank: int = 16
    rank_stabilized: bool = False  # scale by alpha / sqrt(rank) in place of alpha / rank (rsLoRA)
    alpha: float = 32.0
    dropout: float = 0.0
    targets: dict[str, list[str]] = field(default_factory=dict)  # part -> module names, such as text: [q_proj, v_proj]
    quantize: list[str] = field(default_factory=lambda: ["text"])  # qlora: parts whose linear layers are stored in nf4


@dataclass
class EngineConfig:
    name: str = "single"  # single, ddp, fsdp2, zero1, zero2, zero3
    offload: bool = False  # keep what the engine shards in CPU memory (fsdp2, zero1, zero2, zero3)
    shard_within_node: bool = False  # fsdp2: shard over the GPUs of a node, replicate over nodes
    deepspeed: str | None = None  # zero1-3: a DeepSpeed JSON file merged into the generated configuration


@dataclass
class PartOptimizerConfig:
    lr: float | None = None
    weight_decay: float | None = None


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.1  # never on norms, biases, gates and embeddings
    parts: dict[str, PartOptimizerConfig] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    name: str = "cosine"  # constant, linear, cosine, wsd (warmup, stable, decay)
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: how long the decay at the end takes
    final_fraction: float = 0.0  # of the peak learning rate, at max_steps


@dataclass
class TrainerConfig:
    max_steps: int = 1000
    global_batch_size: int = 8  # packs per optimizer step, over all ranks
    micro_batch_size: int = 8  # packs per forward pass of one rank
    precision: str = "bf16"  # fp32, bf16
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    save_every: int = 250
    keep_last: int = 2
    keep_every: int = 0  # checkpoints of steps this divides are kept for good; 0: none
    eval_every: int = 0  # steps between held-out losses; 0: never
    log_every: int = 10
    stop_after: int | None = None  # end this run after that many steps of it, with a checkpoint
    max_skipped_in_a_row: int = 20  # non-finite steps in a row before the run stops
    skip_outliers: float = 0.0  # skip steps whose gradient norm is this many deviations above the last 128; 0: none
    max_hours: float | None = None  # end this run after that time, with a checkpoint
    neftune_alpha: float = 0.0  # noise on the text embeddings; 5 is the paper's choice for fine-tuning
    worst_batch_first: bool = True  # run the largest possible batch once before the first step, changing nothing
    hang_timeout: float = 1800.0  # seconds without progress after which every rank reports and ends; 0: never


@dataclass
class LoggingConfig:
    console: bool = True
    wandb: str = "offline"  # offline, online, disabled
    project: str = "m4train"


@dataclass
class EvaluationConfig:
    """`m4train evaluate`: answers generated for held-out conversations."""

    max_new_tokens: int = 32
    batch_size: int = 64
    max_samples: int | None = None  # per source; null: all


@dataclass
class Config:
    name: str = "run"
    run_dir: str = "runs/${name}"
    seed: int = 0
    resume: str = "auto"  # auto, never, or the path of a checkpoint
    threads: int | None = None  # CPU threads of torch; null: torch's own choice
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key} is {value!r}, but must be one of {', '.join(choices)}.")


def _at_least(key: str, value: float, least: float) -> None:
    _require(value >= least, f"{key} is {value}, but must be at least {least}.")


def check(config: Config) -> None:
    """Refuses combinations that cannot work. Raises ConfigError with one sentence that names the key and the way out."""
    _check_model(config)
    _check_data(config.data)
    _check_training(config)


def _check_model(config: Config) -> None:
    model = config.model
    _one_of("model.family", model.family, MODEL_FAMILIES)
    _require(
        model.pretrained is not None or bool(model.architecture),
        "model.architecture is empty and model.pretrained is null: set model.pretrained to a Hugging Face folder, "
        "or choose a model=... that gives an architecture.",
    )
    _require(
        model.pretrained is not None or model.tokenizer is not None,
        "model.tokenizer is null and model.pretrained is null: set model.tokenizer to a folder that holds tokenizer.json.",
    )
    _at_least("model.z_loss", model.z_loss, 0)


def _check_data(data: DataConfig) -> None:
    for key in ("sequence_length", "images_per_pack", "packing_pool", "prefetch_steps", "shuffle_window"):
        _at_least(f"data.{key}", getattr(data, key), 1)
    for key in ("num_workers", "auto_index_limit"):
        _at_least(f"data.{key}", getattr(data, key), 0)
    _at_least("data.augment.shift_pixels", data.augment.shift_pixels, 0)
    _at_least("data.augment.rotate_degrees", data.augment.rotate_degrees, 0)
    _one_of("data.mixture.by", data.mixture.by, ("samples", "tokens", "images"))
    _require(
        data.mixture.temperature is None or data.mixture.temperature > 0,
        f"data.mixture.temperature is {data.mixture.temperature}, but must be positive, or null to take weights as they are.",
    )
    _one_of("data.long_documents", data.long_documents, ("split", "drop"))
    _require(
        0 <= data.max_bad_fraction <= 1, f"data.max_bad_fraction is {data.max_bad_fraction}: give a share from 0 to 1."
    )
    _require(bool(data.sources), "data.sources is empty: choose a data=... or add data.sources.NAME.path=SHARDS.")
    for group, sources in (("sources", data.sources), ("validation", data.validation)):
        for name, source in sources.items():
            key = f"data.{group}.{name}"
            _require(
                bool(source.path),
                f"{key}.path is empty: give the shards of this source, such as data/train-{{000..099}}.tar.",
            )
            _one_of(f"{key}.loss", source.loss, ("auto", "all", "last_turn"))
            _require(
                source.weight > 0,
                f"{key}.weight is {source.weight}, but must be above 0; remove the source to leave it out.",
            )


def _check_engine(engine: EngineConfig) -> None:
    _one_of("engine.name", engine.name, ENGINES)
    zero = engine.name.startswith("zero")
    _require(
        not engine.offload or zero or engine.name == "fsdp2",
        f"engine.offload is true, but engine.name={engine.name} shards nothing: choose fsdp2 or zero1 to zero3.",
    )
    _require(
        not engine.shard_within_node or engine.name == "fsdp2",
        f"engine.shard_within_node is true, but engine.name is {engine.name}: it is a setting of fsdp2.",
    )
    _require(
        engine.deepspeed is None or zero,
        f"engine.deepspeed is {engine.deepspeed}, but engine.name is {engine.name}: choose zero1, zero2 or zero3.",
    )


def _check_combinations(config: Config) -> None:
    """What one engine, optimizer or adapter cannot do with another, each with its reason."""
    engine, optimizer, adapter = config.engine.name, config.optimizer.name, config.adapter.kind
    _require(
        optimizer != "adamw_8bit" or engine in ("single", "ddp"),
        f"optimizer.name=adamw_8bit cannot work with engine.name={engine}: its block-wise quantised state belongs to "
        "whole tensors, not to shards; choose engine=single or ddp, or optimizer=adamw.",
    )
    _require(
        adapter != "qlora" or engine != "fsdp2",
        "adapter.kind=qlora cannot work with engine.name=fsdp2: it replaces packed 4-bit weights by shards that lose "
        "their scales; choose engine=zero2 or zero3, or adapter=lora.",
    )
    _require(
        config.freeze.frozen_dtype in (None, "bf16"),
        f"freeze.frozen_dtype is {config.freeze.frozen_dtype!r}, but must be bf16 or null.",
    )
    _require(
        config.freeze.frozen_dtype is None or config.trainer.precision == "bf16",
        "freeze.frozen_dtype is bf16, but trainer.precision is fp32: set trainer.precision=bf16, or frozen_dtype to null.",
    )
    _require(
        adapter != "qlora" or bool(config.adapter.quantize),
        "adapter.quantize is empty, but adapter.kind is qlora: name the parts to store in 4 bits, such as [text].",
    )


def _check_training(config: Config) -> None:
    trainer, optimizer = config.trainer, config.optimizer
    for key in (
        "max_steps",
        "global_batch_size",
        "micro_batch_size",
        "save_every",
        "keep_last",
        "log_every",
        "max_skipped_in_a_row",
    ):
        _at_least(f"trainer.{key}", getattr(trainer, key), 1)
    _at_least("trainer.eval_every", trainer.eval_every, 0)
    if trainer.stop_after is not None:
        _at_least("trainer.stop_after", trainer.stop_after, 1)
    _require(trainer.max_grad_norm > 0, f"trainer.max_grad_norm is {trainer.max_grad_norm}, but must be above 0.")
    _require(
        trainer.eval_every == 0 or bool(config.data.validation),
        f"trainer.eval_every is {trainer.eval_every} but data.validation is empty: add a held-out source or set trainer.eval_every=0.",
    )
    _one_of("trainer.precision", trainer.precision, ("fp32", "bf16"))
    _check_engine(config.engine)
    _check_combinations(config)
    _one_of("optimizer.name", optimizer.name, OPTIMIZERS)
    _require(optimizer.lr > 0, f"optimizer.lr is {optimizer.lr}, but must be above 0.")
    _require(len(optimizer.betas) == 2, f"optimizer.betas is {optimizer.betas}, but must hold two numbers.")
    _one_of("schedule.name", config.schedule.name, SCHEDULES)
    _require(
        0 <= config.schedule.warmup_steps <= trainer.max_steps,
        f"schedule.warmup_steps is {config.schedule.warmup_steps}, but must lie between 0 and trainer.max_steps ({trainer.max_steps}).",
    )
    _require(
        config.schedule.name == "wsd" or config.schedule.decay_steps == 0,
        f"schedule.decay_steps is {config.schedule.decay_steps}, but schedule.name={config.schedule.name} has no decay "
        "of its own: choose schedule=wsd.",
    )
    _require(
        config.schedule.name != "wsd"
        or 1 <= config.schedule.decay_steps <= trainer.max_steps - config.schedule.warmup_steps,
        f"schedule.decay_steps is {config.schedule.decay_steps}, but with schedule=wsd it must be at least 1 and fit "
        f"between schedule.warmup_steps and trainer.max_steps ({trainer.max_steps}).",
    )
    for key in ("neftune_alpha", "skip_outliers", "keep_every"):
        _at_least(f"trainer.{key}", getattr(trainer, key), 0)
    _require(
        trainer.max_hours is None or trainer.max_hours > 0,
        f"trainer.max_hours is {trainer.max_hours}, but must be above 0; null sets no limit.",
    )
    _at_least("trainer.hang_timeout", trainer.hang_timeout, 0)
    _one_of("adapter.kind", config.adapter.kind, ADAPTERS)
    _require(
        config.adapter.kind == "none" or bool(config.adapter.targets),
        f"adapter.kind is {config.adapter.kind} but adapter.targets is empty: name the modules per part, such as "
        "adapter.targets.text=[q_proj,v_proj].",
    )
    _one_of("logging.wandb", config.logging.wandb, ("offline", "online", "disabled"))
