"""The schema of `conf/`: one dataclass per group. `config_checks.py` has the checks that need more than one key.

Nothing heavy is imported here: a wrong key is answered before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
