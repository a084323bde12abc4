"""The schema of `conf/`: one dataclass per group. `checks.py` has the checks that need more than one key.

Nothing heavy is imported here: a wrong key is answered before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from m4train.optimizers import OPTIMIZERS as OPTIMIZERS

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
LOSSES = ("auto", "chunked", "torch", "liger")
ADAPTERS = ("none", "lora", "dora", "qlora")


@dataclass
class ModelConfig:
    """What is trained. Either `pretrained` (a Hugging Face folder) or `architecture` (fields of config.json)."""

    family: str = "idefics3"  # idefics, idefics2, idefics3, smolvlm
    pretrained: str | None = None  # folder, hub id, run directory or checkpoint to start from; null: random weights
    vision_pretrained: str | None = None  # with text_pretrained: the towers of a new model, folders or hub ids
    text_pretrained: str | None = None  # with vision_pretrained: the text model of a new model, folder or hub id
    architecture: dict[str, Any] = field(default_factory=dict)  # config.json of a model made from scratch
    processor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json of a model made from scratch
    tokenizer: str | None = None  # folder holding tokenizer.json; null: the one in `pretrained`
    z_loss: float = 0.0  # factor of log(Z)^2 a token, added to the loss to keep logits small; 0: none
    loss: str = (
        "auto"  # who computes it: chunked (m4train), torch, liger; auto: liger on CUDA where it can, else chunked
    )


@dataclass
class DocumentOptions:
    """What is made of the documents of a source. What these options leave out is counted as `skipped`."""

    end_marker: str | None = None  # text that ends a document within a sample, such as that of OBELICS
    max_images: int | None = None  # images of a document past this number are left out
    max_images_in_a_row: int | None = None  # documents with more images between two texts are left out
    ending_images: str = (
        "keep"  # keep; strip: leave out images no text follows; skip: documents ending in two, or in their only one
    )
    require_image: bool = False  # leave out documents without an image


@dataclass
class ConversationOptions:
    """How the conversations of a source vary."""

    shuffle_turns: bool = False  # questions with their answers in random order
    newline_probability: float = 0.0  # of a line break before what a user says
    system_prompt: str | None = None  # said before conversations that have no system message


@dataclass
class ImageOptions:
    """How large the images of a source are made. An image gets fewer tiles, never a part of them, to fit a budget."""

    enlarge: bool = True  # false: never to more tiles than its own pixels fill
    max_tokens: int | None = None  # tokens of one image
    max_tokens_per_sample: int | None = None  # tokens of all images of a sample
    upscale_max: float = 1.0  # enlarge by a random factor up to this one before splitting
    upscale_probability: float = 1.0  # share of the images that upscale_max may enlarge, from 0 to 1
    scaled_decode: bool = False  # decode JPEG at 1/2, 1/4 or 1/8 if that is large enough; pixels differ a little


@dataclass
class SourceConfig:
    """One dataset of the mixture."""

    path: str = ""  # shards: a path or a URL, a glob, or a brace pattern
    format: str = "canonical"  # how they are laid out, see m4train.data.sources.registry
    stream: bool = False  # read through webdataset without an index, such as `pipe:` commands; promises less
    weight: float = 1.0  # share of the samples drawn from this source
    loss_weight: float = 1.0  # of each of its loss tokens against those of other sources
    loss: str = "auto"  # auto: every text token of documents, assistant answers of conversations; or: all, last_turn
    epochs: int | None = None  # passes before the source leaves the mixture; null: data.epochs
    documents: DocumentOptions = field(default_factory=DocumentOptions)
    conversations: ConversationOptions = field(default_factory=ConversationOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    image_range: list[float] = field(
        default_factory=list
    )  # values that are black and white in pictures of more than 8 bits, such as [0, 4095]; empty: as the file says
    variants: int = 8  # of each sample, to draw from if turns, line breaks or sizes of images are random


@dataclass
class AugmentConfig:
    """Random changes of the decoded image, drawn from (seed, epoch, sample)."""

    shift_pixels: int = 0  # translate by up to this many pixels of the source image, edges repeated
    rotate_degrees: float = 0.0  # turn about the centre by up to this angle either way, edges repeated
    crop_scale: list[float] = field(default_factory=list)  # keep a random part with this share of the area: [0.9, 1.0]
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # width / height of that part


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
    """What is trained on, in which order, and how it becomes packs."""

    root: str = "datasets"  # where `prepare` writes
    prepare: str | None = None  # "package.module:function", called as function(root) when its output is missing
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    index_dir: str | None = None  # null: beside each shard; needed for shards in an object store
    cache_dir: str | None = None  # where blocks read from object stores are kept; null: nowhere
    cache_size: float = 64.0  # GiB of them at most, those not used for longest removed
    auto_index_limit: int = 200_000  # samples; larger datasets need `m4train data index` first
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    sequence_length: int = 1024  # token budget of a pack
    images_per_pack: int = 64  # image budget of a pack, in frames
    packing_pool: int = 128  # documents that packing chooses among, twice as many if both budgets are scarce
    long_documents: str = "split"  # split (at item borders), drop
    shuffle: bool = True  # false: samples in stored order
    shuffle_window: int = 8  # row groups, or shards in an object store, that are mixed with each other
    epochs: int | None = None  # null: repeat for as long as the run lasts
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    num_workers: int = 2  # processes that read and decode; 0: in the trainer itself
    prefetch_steps: int = 2  # optimizer steps held ready
    max_bad_fraction: float = 0.02  # stop above this share of dropped samples


@dataclass
class FreezeRule:
    """Sets `trainable` for the parameters it matches; later rules win. A rule that matches nothing is an error."""

    part: str | None = None  # vision, connector, cross_attention, text, embeddings, new_tokens, lm_head; null: any
    names: list[str] = field(default_factory=list)  # glob patterns of canonical parameter names; empty: any
    module_types: list[str] = field(default_factory=list)  # patterns of class names: Linear, "*Norm"; empty: any
    trainable: bool = False  # what the rule sets; false: frozen


@dataclass
class FreezeConfig:
    """Which parameters train, and how those that do not are stored."""

    rules: list[FreezeRule] = field(default_factory=list)
    new_rows_from: int | None = None  # token ids from here on get rows of their own, the part new_tokens; null: none
    frozen_dtype: str | None = None  # bf16: store what does not train in half the memory; null: as it was loaded


@dataclass
class AdapterConfig:
    """Low-rank adapters (peft) on chosen linear layers; what else trains is said by `freeze`."""

    kind: str = "none"  # none, lora, dora, qlora (lora on a base quantised to 4 bits)
    rank: int = 16  # columns of the two low-rank matrices
    rank_stabilized: bool = False  # scale by alpha / sqrt(rank) in place of alpha / rank (rsLoRA)
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # share of the adapter's input that is set to 0 in training
    targets: dict[str, list[str]] = field(default_factory=dict)  # part -> module names, such as text: [q_proj, v_proj]
    modules_to_save: list[str] = field(default_factory=list)  # parts, or names of modules, that train in full beside it
    start_from: str | None = None  # go on from the adapter of a peft folder, or of another run's checkpoint
    quantize: list[str] = field(default_factory=lambda: ["text"])  # qlora: parts whose linear layers are stored in nf4


@dataclass
class EngineConfig:
    """How the work and the weights are shared among processes."""

    name: str = "single"  # single, ddp, fsdp2, zero1, zero2, zero3
    offload: bool = False  # keep what the engine shards in CPU memory (fsdp2, zero1, zero2, zero3)
    shard_within_node: bool = False  # fsdp2: shard over the GPUs of a node, replicate over nodes
    checkpoint: str = "portable"  # native: zero1-3 keep the optimizer as each rank has it, for the same layout
    deepspeed: str | None = None  # zero1-3: a DeepSpeed JSON file merged into the generated configuration


@dataclass
class PartOptimizerConfig:
    lr: float | None = None  # null: optimizer.lr
    weight_decay: float | None = None  # null: optimizer.weight_decay
    decay_all: bool = False  # decay norms, biases, gates and embeddings of this part as well


@dataclass
class OptimizerConfig:
    """How gradients become updates."""

    name: str = "adamw"  # adamw, adamw_8bit, muon (matrices of hidden layers; AdamW for the rest)
    lr: float = 1e-4  # peak learning rate, which `schedule` scales
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # Adam's decay a step of both moments
    eps: float = 1e-8  # added to the root of the second moment
    momentum: float | None = None  # muon: of the matrices; null: 0.95
    weight_decay: float = 0.1  # never on norms, biases, gates and embeddings, but see decay_all
    # other values for a part of the model: vision, connector, cross_attention, text, embeddings, new_tokens, lm_head
    parts: dict[str, PartOptimizerConfig] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """The learning rate over the steps of a run, as a factor of optimizer.lr."""

    name: str = "cosine"  # constant, linear, cosine, wsd (warmup, stable, decay)
    warmup_steps: int = 0  # optimizer steps in which the rate grows linearly to its peak
    decay_steps: int = 0  # wsd: how long the decay at the end takes
    final_fraction: float = 0.0  # of the peak learning rate, at max_steps


@dataclass
class BatchRampConfig:
    """Fewer packs per optimizer step at the start, up to trainer.global_batch_size."""

    start: int | None = None  # packs of step 1; null: global_batch_size from the start
    increment: int = 0  # packs added ...
    steps: int = 0  # ... every so many steps


@dataclass
class TrainerConfig:
    """The loop: how long, how much at a time, in which precision, and what is saved, measured and logged when."""

    max_steps: int = 1000  # optimizer steps of the whole run, over all its continuations
    global_batch_size: int = 8  # packs per optimizer step, over all ranks
    micro_batch_size: int = 8  # packs per forward pass of one rank
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    precision: str = "bf16"  # fp32, bf16
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm over all parameters; inf: never
    gradient_checkpointing: bool = False  # recompute the activations of each block: less memory, more time
    compile: bool = False  # torch.compile each block of the model
    save_every: int = 250  # optimizer steps between checkpoints
    async_checkpoint: bool = True  # training goes on while a checkpoint is written from a copy in CPU memory
    keep_last: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # checkpoints of steps this divides are kept for good; 0: none
    eval_every: int = 0  # steps between held-out losses; 0: never
    log_every: int = 10  # optimizer steps between lines of metrics.jsonl
    stop_after: int | None = None  # end this run after that many steps of it, with a checkpoint
    max_skipped_in_a_row: int = 20  # non-finite steps in a row before the run stops
    skip_outliers: float = 0.0  # skip steps whose gradient norm is this many deviations above the last 128; 0: none
    max_hours: float | None = None  # end this run after that time, with a checkpoint
    neftune_alpha: float = 0.0  # noise on the text embeddings; 5 is the paper's choice for fine-tuning
    worst_batch_first: bool = True  # run the largest possible batch once before the first step, changing nothing
    deterministic: bool = False  # the same bits on CUDA too, if an operation has a slower form that gives them
    hang_timeout: float = (
        1800.0  # seconds without progress (preparing: 4 times) before all ranks report and end; 0: never
    )


@dataclass
class LaunchConfig:
    """Processes of this machine; if torchrun or SLURM starts them, they say how many there are."""

    processes: int | None = None  # started by m4train itself, one per GPU; null: one


@dataclass
class LoggingConfig:
    """Where metrics go besides metrics.jsonl."""

    console: bool = True  # print what trains, a line a logged step, and a progress bar in a terminal
    wandb: str = "offline"  # offline, online, disabled
    project: str = "m4train"  # of W&B


@dataclass
class EvaluationConfig:
    """`m4train evaluate`: held-out loss, and answers generated for held-out conversations."""

    model: str | None = (
        None  # what is evaluated: a Hugging Face folder; null: the newest checkpoint, or that of `resume`
    )
    metric: str = "exact_match"  # exact_match, vqa_accuracy, anls, or "package.module:function"
    metrics: dict[str, str] = field(default_factory=dict)  # sources of data.validation scored by another metric
    max_new_tokens: int = 32  # tokens of an answer at most
    batch_size: int = 64  # questions answered at the same time
    max_samples: int | None = None  # per source; null: all
    shown: int = 4  # answers per source to W&B and the report whenever trainer.eval_every measures; 0: none


@dataclass
class ExportConfig:
    """`m4train export`: a checkpoint as a Hugging Face folder."""

    folder: str | None = None  # null: run_dir/export
    dtype: str | None = None  # fp32, bf16; null: that of model.pretrained, or fp32 for a model made from scratch
    max_shard_size: str = "5GB"  # of one safetensors file; also about the memory that writing takes
    adapters: str = "merge"  # merge: into the weights; apart: a peft folder without them
    base: str = (
        "trained"  # what adapters are merged into: trained (dequantised under qlora), or original (model.pretrained)
    )
    verify: bool = (
        True  # reload it and compare logits with those of the checkpoint, in as much memory as the model takes
    )
    model_card: bool = False  # write README.md


@dataclass
class Config:
    name: str = "run"  # of the run, in its default run_dir, in W&B and in reports
    run_dir: str = "runs/${name}"  # folder that the run writes to, and continues from
    seed: int = 0  # of every random draw: order, variants, augmentation, initial weights, noise, dropout
    resume: str = "auto"  # auto, never, or the path of a checkpoint
    resume_optimizer: str = "kept"  # fresh: go on with a new one; its keys, schedule, max_steps, freezing may differ
    threads: int | None = None  # CPU threads of torch; null: torch's own choice
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
