"""The checks of a configuration that need more than one key: what cannot work is refused before torch is loaded."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, replace
from typing import Any

from m4train.config import (
    ADAPTERS,
    EVERY,
    LOSSES,
    SCHEDULES,
    AdapterConfig,
    BatchRampConfig,
    Config,
    DecodingConfig,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainerConfig,
    optimizer_kind,
)
from m4train.config.combinations import check_combinations
from m4train.config.data_checks import check_data
from m4train.config.logging_checks import check_logging
from m4train.config.require import at_least, leaves, one_of, require
from m4train.errors import ConfigError
from m4train.families import FAMILIES


def check(config: Config, sources: bool = True) -> None:
    """Refuses combinations that cannot work; without `sources`, data and the tokenizer of two towers need not be named yet.

    Raises ConfigError with one sentence that names the key and the way out.
    """
    _check_numbers(config)
    _check_model(config, sources)
    check_data(config, sources)
    _check_training(config)


def _check_numbers(config: Config) -> None:
    """What holds for numbers of any group, and the keys that belong to none."""
    require(bool(config.run_dir.strip()), "run_dir is empty, but must name the folder that the run writes into.")
    for key, value in leaves(asdict(config)):
        endless = key == "trainer.max_grad_norm" and value == math.inf  # never clips
        require(
            not isinstance(value, float) or math.isfinite(value) or endless,
            f"{key} is {value}, but must be a finite number.",
        )
    require(-(2**63) <= config.seed < 2**63, f"seed is {config.seed}, but must fit into 64 bits.")
    require(config.scale in (None, "tiny"), f"scale is {config.scale!r}, but must be tiny, or null.")
    if config.threads is not None:
        at_least("threads", config.threads, 1)


def _check_model(config: Config, sources: bool) -> None:
    model = config.model
    one_of("model.family", model.family, tuple(FAMILIES))
    backbones = (model.vision_pretrained, model.text_pretrained)
    require(
        (backbones[0] is None) == (backbones[1] is None),
        "model.vision_pretrained and model.text_pretrained make a model together: set both of them, or neither.",
    )
    require(
        model.pretrained is None or backbones[0] is None,
        "model.pretrained is a whole model, and model.vision_pretrained the tower of a new one: set one of them to null.",
    )
    one_of("resume_optimizer", config.resume_optimizer, ("kept", "fresh"))
    require(
        model.pretrained is not None or bool(model.architecture) or backbones[0] is not None,
        "model.architecture is empty and model.pretrained is null: set model.pretrained to a Hugging Face folder, "
        "or choose a model=... that gives an architecture.",
    )
    require(
        model.pretrained is not None or model.tokenizer is not None or (backbones[0] is not None and not sources),
        "model.tokenizer is null and model.pretrained is null: set model.tokenizer to a folder that holds tokenizer.json.",
    )
    require(
        model.pretrained is None or not model.architecture,
        f"model.architecture is {model.architecture}, but model.pretrained is {model.pretrained}, whose config.json says it "
        "already: leave model.architecture out, or change that file.",
    )
    _check_added(model)
    at_least("model.z_loss", model.z_loss, 0)
    one_of("model.loss", model.loss, LOSSES)
    require(
        model.loss in ("auto", "chunked") or model.z_loss == 0,
        f"model.loss is {model.loss}, which has no z-loss, but model.z_loss is {model.z_loss}: choose model.loss=chunked.",
    )
    weighted = [name for name, source in config.data.sources.items() if source.loss_weight != 1]
    require(
        model.loss != "liger" or not weighted,
        f"model.loss is liger, which has no token weights, but data.sources.{', '.join(weighted)}.loss_weight is not 1: "
        "choose model.loss=auto.",
    )
    require(
        model.loss in ("auto", "chunked") or "lm_head" not in config.adapter.targets,
        f"model.loss is {model.loss}, which needs the plain head, but adapter.targets names lm_head: choose "
        "model.loss=auto.",
    )


def _check_added(model: ModelConfig) -> None:
    given, key = model.add_tokens or {}, "model.add_tokens"
    if isinstance(given, str) and given.startswith("{"):
        given = json.loads(given)
    require(
        isinstance(given, (list, dict)),
        f"{key} is {given!r}, but must be a list of tokens, or a mapping of tokens to texts.",
    )
    texts = list(given.values()) if isinstance(given, dict) else []
    for token in given:
        require(isinstance(token, str) and bool(token.strip()), f"{key} names {token!r}, but a token must be a text.")
    for text in texts:
        require(
            text is None or (isinstance(text, str) and bool(text)),
            f"{key} begins a token as {text!r}, but must name a text, or null for the mean of all rows.",
        )
    require(len(set(given)) == len(given), f"{key} names a token twice: {given}; leave one of them out.")
    require(
        not given or model.pretrained is not None,
        f"{key} is {given}, but model.pretrained is null: a new model takes every token of model.tokenizer; add them there.",
    )


def _check_batch_ramp(ramp: BatchRampConfig, size: int) -> None:
    key = "trainer.batch_ramp"
    if ramp.start is None:
        require(
            ramp.increment == ramp.steps == 0,
            f"{key}.start is null, but increment is {ramp.increment} and steps is {ramp.steps}: set {key}.start to the packs of step 1.",
        )
        return
    for name, value in (("start", ramp.start), ("increment", ramp.increment), ("steps", ramp.steps)):
        at_least(f"{key}.{name}", value, 1)
    require(
        ramp.start < size,
        f"{key}.start is {ramp.start}, but must be below trainer.global_batch_size ({size}), where the ramp ends.",
    )


def _check_optimizer_start(config: Config) -> None:
    one_of("optimizer.start", config.optimizer.start, ("fresh", "kept"))
    require(
        config.optimizer.start == "fresh" or (config.model.pretrained is not None and config.adapter.kind == "none"),
        "optimizer.start is kept, which needs model.pretrained to name a checkpoint of the same parameters, and no adapter: leave it "
        "out.",
    )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    require(
        len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas),
        f"optimizer.betas is {optimizer.betas}, but must hold two numbers of at least 0 and below 1.",
    )
    require(
        not optimizer.arguments or ":" in optimizer.name,
        f"optimizer.arguments is {optimizer.arguments}, but optimizer.name={optimizer.name} has keys of its own for them: they are for "
        "package.module:Class.",
    )
    require(
        optimizer.name != "schedule_free" or optimizer.betas[0] > 0,
        f"optimizer.betas is {optimizer.betas}, but the first must be above 0 with optimizer.name=schedule_free.",
    )
    require(optimizer.eps > 0, f"optimizer.eps is {optimizer.eps}, but must be above 0.")
    at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    for part, own in optimizer.parts.items():
        require(
            own.lr is None or own.lr > 0,
            f"optimizer.parts.{part}.lr is {own.lr}, but must be above 0; freeze the part to leave it as it is.",
        )
        at_least(f"optimizer.parts.{part}.weight_decay", own.weight_decay or 0, 0)
    require(
        optimizer.momentum is None or optimizer_kind(optimizer.name).whole_matrices,
        f"optimizer.momentum is {optimizer.momentum}, but optimizer.name={optimizer.name} has none: it has betas.",
    )
    require(
        optimizer.momentum is None or 0 <= optimizer.momentum < 1,
        f"optimizer.momentum is {optimizer.momentum}, but must be at least 0 and below 1.",
    )


def _check_training(config: Config) -> None:
    trainer, optimizer = config.trainer, config.optimizer
    for key in (
        "max_steps",
        "global_batch_size",
        "micro_batch_size",
        "keep_last",
        "max_skipped_in_a_row",
    ):
        at_least(f"trainer.{key}", getattr(trainer, key), 1)
    _check_batch_ramp(trainer.batch_ramp, trainer.global_batch_size)
    for key, least in zip(EVERY, (1, 0, 1), strict=True):
        _check_every(f"trainer.{key}", getattr(trainer, key), least)
    _check_watched(trainer)
    if trainer.stop_after is not None:
        at_least("trainer.stop_after", trainer.stop_after, 1)
    require(trainer.max_grad_norm > 0, f"trainer.max_grad_norm is {trainer.max_grad_norm}, but must be above 0.")
    require(
        trainer.eval_every == 0 or bool(config.data.validation),
        f"trainer.eval_every is {trainer.eval_every} but data.validation is empty: add a held-out source or set trainer.eval_every=0.",
    )
    _check_benchmarks(config)
    one_of("trainer.precision", trainer.precision, ("auto", "fp32", "bf16", "fp16"))
    require(
        trainer.compile in (True, False, "auto"),
        f"trainer.compile is {trainer.compile!r}, but must be true, false or auto.",
    )
    check_combinations(config)
    require(optimizer.lr > 0, f"optimizer.lr is {optimizer.lr}, but must be above 0.")
    _check_optimizer(optimizer)
    require(
        optimizer.name != "schedule_free" or config.schedule.name == "constant",
        f"schedule.name is {config.schedule.name}, but optimizer.name=schedule_free replaces the decay of the rate: choose "
        "schedule=constant, with a warmup if you like.",
    )
    _check_optimizer_start(config)
    if trainer.epochs is None and config.schedule.warmup_fraction is None:  # else again, once the steps are counted
        check_schedule(config.schedule, trainer.max_steps)
    else:
        check_schedule(replace(config.schedule, warmup_steps=0), sys.maxsize)
    for key in ("neftune_alpha", "skip_outliers", "keep_every"):
        at_least(f"trainer.{key}", getattr(trainer, key), 0)
    require(
        trainer.max_hours is None or trainer.max_hours > 0,
        f"trainer.max_hours is {trainer.max_hours}, but must be above 0; null sets no limit.",
    )
    at_least("trainer.hang_timeout", trainer.hang_timeout, 0)
    _check_adapter(config.adapter)
    check_logging(config)
    _check_export(config.export)
    for key in ("attempts", "chain"):
        at_least(f"launch.{key}", getattr(config.launch, key), 1)
    _check_evaluation(config)


def _check_every(key: str, value: Any, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(
        whole or value == "epoch" or (isinstance(value, float) and 0 < value < 1),
        f"{key} is {value!r}, but must be a number of steps of at least {least}, a share of the run between 0 and 1, or epoch.",
    )


def _check_watched(trainer: TrainerConfig) -> None:
    require(
        trainer.epochs is None or trainer.epochs > 0,
        f"trainer.epochs is {trainer.epochs}, but must be above 0; null counts the run in trainer.max_steps.",
    )
    one_of("trainer.epochs_until", trainer.epochs_until, ("first", "last"))
    at_least("trainer.early_stopping.patience", trainer.early_stopping.patience, 0)
    at_least("trainer.early_stopping.min_change", trainer.early_stopping.min_change, 0)
    one_of("trainer.best.mode", trainer.best.mode, ("min", "max"))
    one_of("trainer.early_stopping.mode", trainer.early_stopping.mode, ("min", "max"))
    require(
        not trainer.eval_first or trainer.eval_every != 0,
        "trainer.eval_first is true, but trainer.eval_every is 0: set trainer.eval_every as well.",
    )
    watched = {"trainer.best.metric": trainer.best.metric}
    watched |= (
        {"trainer.early_stopping.metric": trainer.early_stopping.metric} if trainer.early_stopping.patience else {}
    )
    for key, metric in watched.items():
        require(
            metric is None or not metric.startswith("eval/") or trainer.eval_every != 0,
            f"{key} is {metric}, but trainer.eval_every is 0, so that it is never measured: set trainer.eval_every.",
        )


def check_schedule(schedule: ScheduleConfig, max_steps: int) -> None:
    one_of("schedule.name", schedule.name, SCHEDULES)
    require(
        schedule.warmup_fraction is None or 0 <= schedule.warmup_fraction <= 1,
        f"schedule.warmup_fraction is {schedule.warmup_fraction}, but must be a share of the run from 0 to 1.",
    )
    require(
        0 <= schedule.warmup_steps <= max_steps,
        f"schedule.warmup_steps is {schedule.warmup_steps}, but must be between 0 and trainer.max_steps ({max_steps}).",
    )
    require(
        schedule.name == "wsd" or schedule.decay_steps == 0,
        f"schedule.decay_steps is {schedule.decay_steps}, but schedule.name={schedule.name} has no decay "
        "of its own: choose schedule=wsd.",
    )
    require(
        schedule.name != "wsd" or 1 <= schedule.decay_steps <= max_steps - schedule.warmup_steps,
        f"schedule.decay_steps is {schedule.decay_steps}, but with schedule=wsd it must be at least 1 and fit "
        f"between schedule.warmup_steps and trainer.max_steps ({max_steps}).",
    )
    require(
        0 <= schedule.final_fraction <= 1,
        f"schedule.final_fraction is {schedule.final_fraction}, but must be a share of the peak rate from 0 to 1.",
    )


def _check_adapter(adapter: AdapterConfig) -> None:
    one_of("adapter.kind", adapter.kind, ADAPTERS)
    require(
        adapter.kind == "none" or bool(adapter.targets),
        f"adapter.kind is {adapter.kind} but adapter.targets is empty: name the modules per part, such as "
        "adapter.targets.text=[q_proj,v_proj].",
    )
    at_least("adapter.rank", adapter.rank, 1)
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in getattr(adapter, key).items():
            require(value > 0, f"adapter.{key} gives {name!r} {value}, but must be above 0.")
    require(adapter.alpha > 0, f"adapter.alpha is {adapter.alpha}, but must be above 0.")
    require(0 <= adapter.dropout < 1, f"adapter.dropout is {adapter.dropout}, but must be at least 0 and below 1.")


def _check_benchmarks(config: Config) -> None:
    trainer = config.trainer
    for name, count in trainer.benchmarks.items():
        at_least(f"trainer.benchmarks.{name}", count, 1)
    require(
        not trainer.benchmarks or (trainer.eval_every != 0 and trainer.benchmark_data is not None),
        "trainer.benchmarks needs trainer.eval_every, and trainer.benchmark_data, the folder of their data: set both.",
    )
    require(
        trainer.benchmark_data is None or bool(trainer.benchmarks),
        "trainer.benchmark_data is set, but trainer.benchmarks names none: set it as well.",
    )
    for name, weight in trainer.benchmark_weights.items():
        require(
            name in trainer.benchmarks and weight > 0,
            f"trainer.benchmark_weights gives {name} {weight}, but it must name one of trainer.benchmarks, above 0.",
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    for key in ("max_new_tokens", "batch_size"):
        at_least(f"evaluation.{key}", getattr(evaluation, key), 1)
    at_least("evaluation.shown", evaluation.shown, 0)
    _check_decoding(evaluation.decoding)
    if evaluation.max_samples is not None:
        at_least("evaluation.max_samples", evaluation.max_samples, 1)
    unknown = sorted(set(evaluation.metrics) - set(config.data.validation))
    require(
        not unknown,
        f"evaluation.metrics names {', '.join(unknown)}, but data.validation has "
        f"{', '.join(config.data.validation) or 'no source'}.",
    )


def _check_decoding(decoding: DecodingConfig) -> None:
    key = "evaluation.decoding"
    at_least(f"{key}.num_beams", decoding.num_beams, 1)
    for name in ("top_k", "no_repeat_ngram_size"):
        at_least(f"{key}.{name}", getattr(decoding, name), 0)
    for name in ("temperature", "repetition_penalty"):
        value = getattr(decoding, name)
        require(value > 0, f"{key}.{name} is {value}, but must be above 0; 1 changes nothing.")
    require(0 < decoding.top_p <= 1, f"{key}.top_p is {decoding.top_p}, but must be above 0 and at most 1.")
    plain = DecodingConfig()
    for switch, on, names in (
        ("do_sample=true", decoding.do_sample, ("temperature", "top_k", "top_p")),
        ("num_beams above 1", decoding.num_beams > 1, ("length_penalty",)),
    ):
        for name in names:
            value = getattr(decoding, name)
            require(
                on or value == getattr(plain, name), f"{key}.{name} is {value}, which acts with {key}.{switch} alone."
            )


def _check_export(export: ExportConfig) -> None:
    require(
        export.dtype in (None, "fp32", "bf16"), f"export.dtype is {export.dtype!r}, but must be fp32, bf16 or null."
    )
    one_of("export.adapters", export.adapters, ("merge", "apart"))
    one_of("export.base", export.base, ("trained", "original"))
    require(
        export.adapters == "merge" or export.base == "trained",
        "export.base is original, but export.adapters is apart: nothing is merged; leave export.base out.",
    )
    size_in_bytes("export.max_shard_size", export.max_shard_size)


def size_in_bytes(key: str, text: str) -> int:
    """Bytes of a size such as 5GB or 300MB. Raises ConfigError naming `key`."""
    match = re.fullmatch(r"([1-9]\d*) ?([KMGT]?)B", text.strip().upper())
    if match is None:
        raise ConfigError(f"{key} is {text!r}, but must be a size such as 5GB or 300MB.")
    return int(match[1]) * 1000 ** "KMGT".index(match[2]) * 1000 if match[2] else int(match[1])
