"""The schema of `conf/`: one dataclass per group, that of `data` in `data_schema.py`. `checks.py` has the checks that need
more than one key.

Nothing heavy is imported here: a wrong key is answered before torch is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from m4train.config.data_schema import DataConfig
from m4train.optimizers import OPTIMIZERS as OPTIMIZERS
from m4train.optimizers import optimizer_kind as optimizer_kind

# The engines by name, each with the class ("module:class") that is made of a Config. One of its own is added here.
ENGINES = {
    "single": "m4train.training.engines.single:SingleEngine",
    "ddp": "m4train.training.engines.ddp:DDPEngine",
    "fsdp2": "m4train.training.engines.fsdp:FSDPEngine",
    **dict.fromkeys(("zero1", "zero2", "zero3"), "m4train.training.engines.deepspeed:DeepSpeedEngine"),
}
SCHEDULES = ("constant", "linear", "cosine", "wsd")
LOSSES = ("auto", "chunked", "torch", "liger")
ADAPTERS = ("none", "lora", "dora", "qlora")


@dataclass
class ModelConfig:
    """What is trained. Either `pretrained` (a Hugging Face folder) or `architecture` (fields of config.json)."""

    family: str = "idefics3"  # which architecture: idefics, idefics2, idefics3 or smolvlm; must be that of `pretrained`
    # start from: Hugging Face folder, hub id (also ORG/NAME@REVISION), run directory, checkpoint, artifact
    # (wandb:ENTITY/PROJECT/NAME:best); null: a new model
    pretrained: str | None = None
    vision_pretrained: str | None = None  # folder or hub id of a new model's vision tower; needs text_pretrained
    text_pretrained: str | None = None  # folder or hub id of a new model's text model; needs vision_pretrained
    architecture: dict[str, Any] = field(default_factory=dict)  # keys of config.json, for a model from scratch
    # settings of the processor (keys of preprocessor_config.json, processor_config.json and tokenizer_config.json); those of
    # `pretrained` that are not named here stay
    processor: dict[str, Any] = field(default_factory=dict)
    # tokens that `pretrained` does not know, each with a row of its own in embeddings and head (the part new_tokens, which
    # trains unless a freeze rule says otherwise): a list such as ["<box>"], or a mapping (on the command line as JSON) of each
    # to a text: it begins as the mean of that text's rows; without a text as the mean of all rows
    add_tokens: Any = None
    tokenizer: str | None = None  # folder that holds tokenizer.json; null: that of `pretrained`
    z_loss: float = 0.0  # factor of log(Z)^2 per token, which is added to the loss to keep logits small; 0: none
    # code of the loss: chunked (m4train), torch, liger; auto: liger on CUDA if possible, else chunked
    loss: str = "auto"

    @property
    def texts_of_added(self) -> dict[str, str | None]:
        """Each token of `add_tokens` with the text it begins as, if one is given."""
        given = json.loads(self.add_tokens) if isinstance(self.add_tokens, str) else self.add_tokens
        return dict(given) if isinstance(given, dict) else dict.fromkeys(given or ())


@dataclass
class FreezeRule:
    """Sets `trainable` for the parameters it matches; later rules win. A rule that matches nothing is an error."""

    part: str | None = None  # vision, connector, cross_attention, text, embeddings, new_tokens, lm_head; null: any part
    # glob patterns of parameter names as in the checkpoint, such as "*embeddings*"; empty: any
    names: list[str] = field(default_factory=list)
    # glob patterns of the class of the module that holds the parameter: Linear, "*Norm"; empty: any
    module_types: list[str] = field(default_factory=list)
    trainable: bool = False  # what the rule sets: true trains the parameters, false freezes them


@dataclass
class FreezeConfig:
    """Which parameters train, and how those that do not are stored."""

    rules: list[FreezeRule] = field(default_factory=list)
    new_rows_from: int | None = None  # token id from which tokens get embedding rows of their own, the part new_tokens
    frozen_dtype: str | None = None  # bf16: store frozen parameters in half the memory; null: as they were loaded


@dataclass
class AdapterConfig:
    """Low-rank adapters (peft) on chosen linear layers; what else trains is said by `freeze`."""

    kind: str = "none"  # none, lora, dora, or qlora (lora on a base stored in 4 bits)
    rank: int = 16  # rank r of the two matrices (in x r, r x out) added to a layer; more: more capacity and memory
    rank_stabilized: bool = False  # multiply by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # share of the adapter's inputs set to 0 while training, from 0 to below 1
    # rank of some modules instead of `rank`: pattern of the end of a module's name -> rank, as in peft
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # the same for alpha
    # part, or "*" for any -> the linear layers that get an adapter: names (text: [q_proj, v_proj]), patterns ("layers.[01].*"), or
    # all-linear for all but the head
    targets: dict[str, list[str]] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)  # parts or names of modules that train in full as well
    start_from: str | None = None  # peft folder, or another run's checkpoint, to go on with the adapter of; null: new
    # take kind, rank, alpha, targets and modules_to_save from start_from; false: they have to agree with it
    from_config: bool = False
    quantize: list[str] = field(default_factory=lambda: ["text"])  # qlora: parts whose linear layers get 4 bits (nf4)


@dataclass
class EngineConfig:
    """How the work and the weights are shared among processes."""

    name: str = "single"  # single, ddp, fsdp2, or zero1, zero2, zero3 (DeepSpeed)
    offload: bool = False  # keep what the engine shards in CPU memory (fsdp2, zero1 to zero3): less GPU memory, slower
    # fsdp2: shard over the GPUs of a node, replicate over nodes: less traffic, more memory
    shard_within_node: bool = False
    # portable: resumes under any engine and number of ranks; native: zero1 to zero3 store the optimizer as each rank
    # has it, for the same engine and number of ranks only
    checkpoint: str = "portable"
    deepspeed: str | None = None  # zero1 to zero3: a DeepSpeed JSON file, merged into the generated configuration


@dataclass
class PartOptimizerConfig:
    """What differs for one part of the model."""

    lr: float | None = None  # peak learning rate of this part; null: optimizer.lr
    weight_decay: float | None = None  # weight decay of this part; null: optimizer.weight_decay
    decay_all: bool = False  # apply weight decay to norms, biases, gates and embeddings of this part as well


@dataclass
class OptimizerConfig:
    """How gradients become updates."""

    # adamw, adamw_8bit and paged_adamw_8bit (bitsandbytes), muon (matrices of hidden layers; AdamW for the rest), adafactor, lion
    # (bitsandbytes), schedule_free (schedulefree), or a class of torch.optim's kind as package.module:Class
    name: str = "adamw"
    arguments: dict[str, Any] = field(
        default_factory=dict
    )  # more arguments of package.module:Class, such as {beta3: 0.9}
    lr: float = 1e-4  # peak learning rate, which `schedule` scales
    # decay per step of the first and second moment of Adam, each from 0 to below 1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8  # added to the square root of the second moment, so that nothing is divided by 0
    momentum: float | None = None  # muon: decay per step of the momentum of the matrices; null: 0.95
    # per step, times the learning rate; not on norms, biases, gates, embeddings (see decay_all)
    weight_decay: float = 0.1
    # fresh; or kept: begin with the optimizer state of the checkpoint that model.pretrained names, of the same parameters
    start: str = "fresh"
    # other values for a part of the model: vision, connector, cross_attention, text, embeddings, new_tokens, lm_head
    parts: dict[str, PartOptimizerConfig] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """The learning rate over the steps of a run, as a factor of optimizer.lr."""

    name: str = "cosine"  # shape after the warmup: constant, linear, cosine, wsd (warmup, stable, decay)
    warmup_steps: int = 0  # optimizer steps in which the rate grows linearly to its peak
    # the same as a share of the run, from 0 to 1, instead of warmup_steps; null: warmup_steps
    warmup_fraction: float | None = None
    decay_steps: int = 0  # wsd: optimizer steps of the decay at the end
    final_fraction: float = 0.0  # share of the peak rate that is left at trainer.max_steps, from 0 to 1


@dataclass
class BatchRampConfig:
    """Fewer packs per optimizer step at the start, up to trainer.global_batch_size."""

    start: int | None = None  # packs of step 1; null: trainer.global_batch_size from the start
    increment: int = 0  # packs added every `steps` optimizer steps
    steps: int = 0  # optimizer steps between two increments


EVERY = ("save_every", "eval_every", "log_every")  # in optimizer steps, as a share of the run, or `epoch`


@dataclass
class BestConfig:
    """A checkpoint that is kept because a value was never better."""

    metric: str | None = None  # name of a logged value, such as eval/loss; null: no checkpoint is kept for its value
    mode: str = "min"  # min: lower is better; max: higher is


@dataclass
class EarlyStoppingConfig:
    """The end of a run that no longer gets better."""

    patience: int = 0  # the run ends after this many values in a row that are not better; 0: never
    metric: str = "eval/loss"  # name of the logged value
    mode: str = "min"  # min: lower is better; max: higher is
    min_change: float = 0.0  # a value has to be better by more than this, in the unit of the metric


@dataclass
class TrainerConfig:
    """The loop: how long, how much at a time, in which precision, and what is saved, measured and logged when."""

    max_steps: int = 1000  # optimizer steps of the whole run, over all its continuations
    # passes over the data instead of max_steps, which is then counted from the plan; 0.5: half of one; null: max_steps
    epochs: float | None = None
    # of several sources, the one whose passes are counted: the first or the last to be through
    epochs_until: str = "first"
    global_batch_size: int = 8  # packs per optimizer step, over all ranks
    micro_batch_size: int = 8  # packs per forward pass of one rank; changes memory and speed, not the result
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    # fp32; bf16 or fp16 (weights in fp32, matrix products in that; fp16 scales the loss); auto: bf16 if the GPU or CPU has
    # instructions for it, else fp16 on a GPU and fp32 on a CPU; a run goes on with what it began with
    precision: str = "auto"
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm over all parameters; inf: never
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    # compile what lies between attention in each block with torch.compile (true, false): faster steps after a start that takes
    # up to a minute longer; auto: on a GPU that Triton knows with a C compiler, unless engine.name is zero3 or adapter.kind dora
    compile: Any = "auto"
    # between checkpoints: optimizer steps, or a share of the run (0.1), or `epoch`
    save_every: Any = 250
    async_checkpoint: bool = True  # train on while a checkpoint is written from a copy in CPU memory; false: wait
    keep_last: int = 2  # number of newest checkpoints that are kept
    keep_every: int = 0  # checkpoints at multiples of this many steps are kept for good; 0: none
    # between measurements of the held-out loss: optimizer steps, or a share of the run, or `epoch`; 0: never
    eval_every: Any = 0
    eval_first: bool = False  # measure the held-out loss before step 1 as well
    # benchmark -> samples of it that are scored at each trainer.eval_every, always the same ones
    benchmarks: dict[str, int] = field(default_factory=dict)
    benchmark_data: str | None = None  # folder that holds a folder or file for each of trainer.benchmarks
    # benchmark -> its weight in eval/benchmarks, which trainer.best.metric may name; not named: 1
    benchmark_weights: dict[str, float] = field(default_factory=dict)
    # between lines of metrics.jsonl, the console and W&B: optimizer steps, or a share of the run, or `epoch`
    log_every: Any = 10
    best: BestConfig = field(default_factory=BestConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    stop_after: int | None = None  # optimizer steps after which this start of the run ends with a checkpoint
    max_skipped_in_a_row: int = 20  # the run stops after this many skipped (non-finite) optimizer steps in a row
    skip_outliers: float = 0.0  # skip steps with a gradient norm this many deviations above the mean of the last 128
    max_hours: float | None = None  # hours after which this start of the run ends with a checkpoint; null: no limit
    # size of random noise on the text embeddings (NEFTune); 5 is usual in fine-tuning; 0: none
    neftune_alpha: float = 0.0
    # run the largest possible batch before step 1, so that too little memory shows at once
    worst_batch_first: bool = True
    deterministic: bool = False  # use operations on CUDA that always give the same bits, if there are such; slower
    # seconds without progress (preparing: 4 times) before all ranks report and end; 0: never
    hang_timeout: float = 1800.0


@dataclass
class LaunchConfig:
    """Processes of this machine; if torchrun or SLURM starts them, they say how many there are."""

    processes: int | None = None  # processes that m4train starts on this machine, one per GPU; null: one
    # `launch slurm`: starts of the ranks, within a job and after requeues, that may fail without a new checkpoint
    attempts: int = 3
    chain: int = (
        1  # `launch slurm`: jobs that are submitted, each to go on when the one before has ended, for short limits
    )
    # `launch slurm`: if a node fails its check before training, submit the job again without it; false: the job fails
    exclude_bad_nodes: bool = False


@dataclass
class WandbConfig:
    """Weights & Biases. What is null is said by its variable (in brackets), else by what follows it."""

    # offline (files in run_dir, which `m4train sync` sends), online, disabled; null: [WANDB_MODE], else offline
    mode: str | None = None
    entity: str | None = None  # team or user; null: [WANDB_ENTITY], else that of the key
    project: str | None = None  # null: [WANDB_PROJECT], else m4train
    # runs shown together; null: [WANDB_RUN_GROUP], else the name of the run that the first stage was
    group: str | None = None
    job_type: str | None = None  # what a run is within its group; null: [WANDB_JOB_TYPE], else train or evaluate
    name: str | None = None  # of the run; null: [WANDB_NAME], else `name`
    id: str | None = None  # of the run; null: [WANDB_RUN_ID], else that of run_dir, or a new one
    tags: list[str] = field(default_factory=list)  # words to find runs by; empty: [WANDB_TAGS], else none
    notes: str | None = None  # a longer text about the run; null: [WANDB_NOTES], else none
    dir: str | None = None  # folder in which the folder wandb is written; null: [WANDB_DIR], else run_dir
    # what happens if the id is known to the server: allow (go on), must, never, auto; null: [WANDB_RESUME], else allow
    resume: str | None = None
    save_code: bool | None = None  # keep the code of m4train with the run; null: [WANDB_SAVE_CODE], else false
    # checkpoints that become artifacts NAME-ID: none, last (when a start of the run ends), best (by trainer.best.metric), all; with
    # another value than none, `m4train export` makes one of what it writes as well
    artifacts: str = "none"
    # artifacts hold paths instead of copies: for a run_dir on storage that every machine sees under the same path
    by_reference: bool = False


@dataclass
class LoggingConfig:
    """Where metrics go besides metrics.jsonl."""

    # print what trains, what memory and time are expected and were measured, a line per logged step, and a progress bar in a
    # terminal
    console: bool = True
    # what follows the run besides metrics.jsonl: wandb, tensorboard, or a class of the kind of Tracker as package.module:Class
    trackers: list[str] = field(default_factory=lambda: ["wandb"])
    first_packs: int = (
        2  # packs of step 1 that trackers get as a table, with what is trained on and what is not; 0: none
    )
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class DecodingConfig:
    """How answers are made, token by token: the most likely one each time, unless these keys say otherwise. What the model's
    generation_config.json says of it does not count; the ids that it forbids (bad_words_ids) stay forbidden."""

    do_sample: bool = False  # draw each token by its probability, the same ones for the same seed
    temperature: float = 1.0  # do_sample: logits are divided by it
    top_k: int = 0  # do_sample: draw among this many most likely tokens; 0: among all
    top_p: float = 1.0  # do_sample: draw among the fewest tokens that hold this share of the probability
    num_beams: int = 1  # above 1: the best sequence of a beam search this wide
    length_penalty: float = 1.0  # num_beams: exponent of the length (tokens) by which a beam's score is divided
    repetition_penalty: float = 1.0  # above 1: tokens that the text holds already become less likely by this factor
    no_repeat_ngram_size: int = 0  # no sequence of this many tokens appears twice; 0: any may


@dataclass
class EvaluationConfig:
    """`m4train evaluate`: held-out loss, and answers generated for held-out conversations."""

    model: str | None = None  # Hugging Face folder to evaluate; null: the newest checkpoint, or that of `resume`
    # score of answers: exact_match, vqa_accuracy, anls, relaxed_accuracy, ... (docs/evaluation.md), "package.module:function"
    metric: str = "exact_match"
    metrics: dict[str, str] = field(default_factory=dict)  # source of data.validation -> a metric of its own
    max_new_tokens: int = 32  # tokens of an answer at most
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    batch_size: int = 64  # questions answered at the same time; more: faster, more memory
    max_samples: int | None = None  # samples per source that are answered at most; null: all
    shown: int = 4  # answers per source that go to W&B and the report at each trainer.eval_every; 0: none


@dataclass
class ExportConfig:
    """`m4train export`: a checkpoint as a Hugging Face folder."""

    folder: str | None = None  # folder to write, new, empty or an earlier export; null: run_dir/export
    dtype: str | None = None  # fp32 or bf16; null: that of model.pretrained, or fp32 for a model from scratch
    max_shard_size: str = "5GB"  # size of one safetensors file, such as 5GB; about the memory that writing takes
    adapters: str = "merge"  # merge: add adapters to the weights; apart: write a peft folder of the adapters alone
    # weights to merge adapters into: trained (dequantised under qlora), original (model.pretrained)
    base: str = "trained"
    verify: bool = True  # load the export and compare its logits with the checkpoint's; takes the memory of the model
    model_card: bool = False  # write README.md into the folder; --push-to always does
    license: str | None = (
        None  # of the weights, on the model card, as the Hub names it, such as apache-2.0; null: none is named
    )


@dataclass
class StageConfig:
    """One of several runs that follow each other, each from the weights of the one before."""

    name: str = ""  # of the stage: its folder in run_dir, and what `stage=NAME` chooses
    experiment: str | None = None  # choice of conf/experiment that it trains; null: this same configuration
    # overrides of this stage, as on the command line, whose own come after them: [freeze=none, optimizer.lr=1e-4]
    overrides: list[str] = field(default_factory=list)


@dataclass
class Config:
    """One run."""

    name: str = "run"  # name of the run, in its default run_dir, in W&B and in reports
    run_dir: str = "runs/${name}"  # folder that the run writes to, and continues from
    # whole number that every random draw follows from: order, variants, augmentation, weights, noise, dropout
    seed: int = 0
    resume: str = "auto"  # auto: the newest checkpoint in run_dir; never: refuse if there is one; or the path of one
    # fresh: go on without the checkpoint's optimizer; its keys, schedule, max_steps, freezing may differ; kept: with
    # it
    resume_optimizer: str = "kept"
    # tiny: rehearse the same recipe with a tiny model of the family from random weights, short packs and a few steps;
    # null: as it is
    scale: str | None = None
    # runs that `m4train train` trains one after another, each in run_dir/NAME and from the last one's weights; []: one run
    stages: list[StageConfig] = field(default_factory=list)
    stage: str | None = (
        None  # the one of `stages` that a command is about; train: only this one, again if it is trained
    )
    threads: int | None = None  # CPU threads of torch per process; null: torch's own choice
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
