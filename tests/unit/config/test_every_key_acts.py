"""For every key of the schema: another value changes something that is seen here, is refused with a reason, or is listed with
the test that shows it, because it takes a machine, an engine or a whole run to see."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from m4train import build
from m4train.config import Config
from m4train.config.compose import load_config
from m4train.config.describe import all_keys
from m4train.errors import ConfigError, M4Error
from m4train.training.schedule import rate_factor
from tests.helpers.data import conversations, documents, write_shards
from tests.helpers.processing import tokenizer_folder
from tests.helpers.training import make_config, make_trainer, read_metrics

ROOT = Path(__file__).parents[3]
TALKS, PAGES = "data.sources.talks", "data.sources.pages"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "pages", documents(14))
    write_shards(folder / "talks", conversations(10))
    return folder


def base(data: Path) -> list[str]:
    paths = [f"{TALKS}.path={data}/talks/*.tar", f"{PAGES}.path={data}/pages/*.tar"]
    validation = f"data.validation={{held: {{path: '{data}/talks/*.tar'}}}}"
    sizes = ["data.num_workers=0", "data.sequence_length=256", "data.images_per_pack=16", "data.packing_pool=6"]
    sizes += [
        "trainer.global_batch_size=2",
        "trainer.micro_batch_size=2",
        "trainer.precision=fp32",
        "trainer.max_steps=4",
    ]
    start = [
        "experiment=digits_pretrain",
        f"model.tokenizer={tokenizer_folder()}",
        "data.prepare=null",
        "data.augment.shift_pixels=0",
    ]
    start += ["data.augment.rotate_degrees=0", "schedule.warmup_steps=1", "trainer.eval_every=0", "logging=none"]
    return [*start, *paths, validation, *sizes]


# What is seen of a configuration


def steps(config: Config) -> Any:
    """The batches of the first steps, or the error that says why there are none."""
    try:
        run = build.build_data(config, build.build_processor(config), 0, 1)
        digest = hashlib.sha256()
        for _, step in zip(range(3), run.steps(None)):
            for batch in step.micro_batches:
                for tensor in (batch.input_ids, batch.targets, batch.target_weights, batch.images.pixels):
                    digest.update(b"" if tensor is None else tensor.numpy().tobytes())
            digest.update(repr(len(step.micro_batches)).encode())
        return digest.hexdigest()
    except M4Error as error:
        return str(error)


def model(config: Config) -> Any:
    """Names, shapes, types, values and what trains of the model that is built."""
    try:
        built = build.build_model(config, build.build_processor(config))
    except M4Error as error:
        return str(error)
    seen = {n: (p.shape, p.dtype, p.requires_grad, p.float().sum().item()) for n, p in built.named_parameters()}
    modules = {
        n: (type(m).__name__, getattr(m, "p", None), getattr(m, "scaling", None)) for n, m in built.named_modules()
    }
    return seen, {n: repr(m) for n, m in modules.items()}, built.loss_kind


def processor(config: Config) -> Any:
    return build.build_processor(config).fingerprint()


def rates(config: Config) -> Any:
    return [
        rate_factor(config.schedule, config.trainer.max_steps, step) for step in range(1, config.trainer.max_steps + 1)
    ]


def settings(config: Config) -> Any:
    return asdict(config.evaluation.decoding), config.evaluation.max_new_tokens


def trained(config: Config) -> Any:
    """Metrics and files of a few steps of a tiny model."""
    tiny = make_config(config.run_dir)
    tiny.trainer, tiny.optimizer, tiny.schedule, tiny.model = (
        config.trainer,
        config.optimizer,
        config.schedule,
        config.model,
    )
    make_trainer(tiny).train()
    steady = ("step", "loss", "lr", "grad_norm", "eval/loss")
    metrics = [{key: row[key] for key in steady if key in row} for row in read_metrics(config.run_dir)]
    files = sorted(str(path.relative_to(config.run_dir)) for path in Path(config.run_dir).glob("checkpoints/step-*"))
    return metrics, files


# key -> (what is seen, what else both configurations say, the value that differs)
Act = tuple[Callable[[Config], Any], list[str], str]
LORA = ["adapter=lora", "adapter.targets={text: [q_proj]}", "freeze=none"]
SHIFTED = ["data.augment.shift_pixels=3"]
CROPPED = ["data.augment.crop_scale=[0.5, 0.6]"]
DRAWN = ["evaluation.decoding.do_sample=true"]
BEAMS = ["evaluation.decoding.num_beams=2"]
ACTS: dict[str, Act] = {
    "seed": (steps, [], "7"),
    "model.family": (model, [], "smolvlm"),
    "model.architecture": (model, [], "{tie_word_embeddings: false}"),
    "model.processor": (processor, [], "{image_mean: [0.5, 0.5, 0.5], do_image_splitting: true}"),
    "model.tokenizer": (processor, [], "OTHER"),
    "model.loss": (model, [], "chunked"),
    "data.sources.NAME.path": (steps, [], "OTHER"),
    "data.sources.NAME.format": (steps, [], "pairs"),
    "data.sources.NAME.weight": (steps, [], "9"),
    "data.sources.NAME.loss": (steps, [], "all"),
    "data.sources.NAME.epochs": (steps, [], "1"),
    "data.sources.NAME.documents.end_marker": (steps, [], "Page"),
    "data.sources.NAME.documents.max_images": (steps, [], "1"),
    "data.sources.NAME.conversations.newline_probability": (steps, [], "0.9"),
    "data.sources.NAME.conversations.system_prompt": (steps, [], "'Be brief.'"),
    "data.sources.NAME.images.max_tokens": (steps, ["model.processor.do_image_splitting=true"], "2"),
    "data.mixture.temperature": (steps, [], "4"),
    "data.mixture.by": (steps, [], "tokens"),
    "data.mixture.schedule": (steps, [], "{2: {talks: 50}}"),
    "data.sequence_length": (steps, [], "128"),
    "data.images_per_pack": (steps, [], "4"),
    "data.long_documents": (steps, ["data.sequence_length=48"], "drop"),
    "data.shuffle": (steps, [], "false"),
    "data.augment.shift_pixels": (steps, [], "3"),
    "data.augment.rotate_degrees": (steps, [], "30"),
    "data.augment.crop_scale": (steps, [], "[0.5, 0.6]"),
    "data.augment.crop_ratio": (steps, CROPPED, "[0.3, 0.4]"),
    "freeze.rules.N.part": (model, [], "RULE {part: vision}"),
    "freeze.rules.N.names": (model, [], "RULE {names: ['*q_proj*']}"),
    "freeze.rules.N.module_types": (model, [], "RULE {module_types: ['*Norm']}"),
    "freeze.new_rows_from": (model, [], "300"),
    "adapter.kind": (model, ["adapter.targets={text: [q_proj]}", "freeze=none"], "dora"),
    "adapter.rank": (model, LORA, "3"),
    "adapter.rank_stabilized": (model, LORA, "true"),
    "adapter.alpha": (model, LORA, "7"),
    "adapter.dropout": (model, LORA, "0.3"),
    "adapter.targets": (model, LORA, "{text: [v_proj]}"),
    "adapter.modules_to_save": (model, LORA, "[connector]"),
    "schedule.name": (rates, [], "linear"),
    "schedule.warmup_steps": (rates, [], "3"),
    "schedule.decay_steps": (rates, ["schedule.name=wsd", "schedule.decay_steps=1"], "2"),
    "schedule.final_fraction": (rates, [], "0.5"),
    "trainer.max_steps": (trained, [], "3"),
    "trainer.micro_batch_size": (steps, [], "1"),
    "trainer.global_batch_size": (steps, [], "4"),
    "trainer.max_grad_norm": (trained, [], "0.001"),
    "trainer.save_every": (trained, [], "2"),
    "trainer.keep_last": (trained, ["trainer.save_every=1"], "1"),
    "trainer.keep_every": (trained, ["trainer.save_every=1", "trainer.keep_last=1"], "2"),
    "trainer.eval_every": (trained, [], "2"),
    "trainer.log_every": (trained, ["trainer.log_every=1"], "2"),
    "trainer.stop_after": (trained, [], "2"),
    "model.z_loss": (trained, [], "0.5"),
    "optimizer.lr": (trained, [], "0.05"),
    "optimizer.betas": (trained, [], "[0.1, 0.2]"),
    "optimizer.eps": (trained, [], "0.3"),
    "optimizer.weight_decay": (trained, [], "0.9"),
    "optimizer.parts.NAME.lr": (trained, [], "PART {text: {lr: 0.09}}"),
    "optimizer.parts.NAME.weight_decay": (trained, [], "PART {text: {weight_decay: 9.0}}"),
    "optimizer.parts.NAME.decay_all": (trained, ["optimizer.weight_decay=5"], "PART {embeddings: {decay_all: true}}"),
    "evaluation.max_new_tokens": (settings, [], "5"),
    "evaluation.decoding.do_sample": (settings, [], "true"),
    "evaluation.decoding.temperature": (settings, DRAWN, "2"),
    "evaluation.decoding.top_k": (settings, DRAWN, "3"),
    "evaluation.decoding.top_p": (settings, DRAWN, "0.4"),
    "evaluation.decoding.num_beams": (settings, [], "3"),
    "evaluation.decoding.length_penalty": (settings, BEAMS, "2"),
    "evaluation.decoding.repetition_penalty": (settings, [], "2"),
    "evaluation.decoding.no_repeat_ngram_size": (settings, [], "2"),
}
# key -> (a value that cannot act with the defaults, what is said)
REFUSED: dict[str, tuple[list[str], str]] = {
    "model.vision_pretrained": (["model.vision_pretrained=x"], "set both of them, or neither"),
    "model.text_pretrained": (["model.text_pretrained=x"], "set both of them, or neither"),
    "data.sources.NAME.images.upscale_probability": ([f"{TALKS}.images.upscale_probability=0.5"], "raise that one"),
    "adapter.start_from": (["adapter.start_from=x"], "adapter.kind is none"),
    "engine.offload": (["engine.offload=true"], "shards nothing"),
    "engine.shard_within_node": (["engine.shard_within_node=true"], "it is a setting of fsdp2"),
    "engine.checkpoint": (["engine.checkpoint=native"], "portable as they are"),
    "engine.deepspeed": (["engine.deepspeed=x"], "choose zero1, zero2 or zero3"),
    "optimizer.momentum": (["optimizer.momentum=0.5"], "has none: it has betas"),
    "launch.processes": (["launch.processes=2"], "which runs on one"),
    "trainer.batch_ramp.increment": (["trainer.batch_ramp.increment=1"], "start is null"),
    "trainer.batch_ramp.steps": (["trainer.batch_ramp.steps=1"], "start is null"),
    "export.base": (["export.base=original", "export.adapters=apart"], "nothing is merged"),
}
# key -> the tests elsewhere that see what it does, because the first steps do not show it
SHOWN: dict[str, str] = {
    "resume": "unit/training/checkpoints/test_save.py",
    "resume_optimizer": "unit/test_starting_points.py",
    "threads": "unit/training/checkpoints/test_save.py",
    "model.pretrained": "unit/test_pretrained_keys.py",
    "model.add_tokens": "unit/training/test_new_tokens.py",
    "data.sources.NAME.fields": "unit/data/sources/test_records.py",
    "data.sources.NAME.ignore_fields": "unit/data/sources/test_unread.py",
    "data.sources.NAME.placeholder": "unit/data/sources/test_records.py",
    "data.sources.NAME.missing_images": "unit/data/sources/test_records.py",
    "data.sources.NAME.stream": "unit/data/loading/test_stream_loader.py",
    "data.sources.NAME.documents.max_images_in_a_row": "unit/data/documents/test_variants.py",
    "data.sources.NAME.documents.ending_images": "unit/data/documents/test_variants.py",
    "data.sources.NAME.documents.require_image": "unit/data/documents/test_variants.py",
    "data.sources.NAME.conversations.shuffle_turns": "unit/data/documents/test_variants.py",
    "data.sources.NAME.images.enlarge": "unit/data/documents/test_variants.py",
    "data.sources.NAME.images.max_tokens_per_sample": "unit/data/documents/test_variants.py",
    "data.sources.NAME.images.upscale_max": "unit/data/documents/test_variants.py",
    "data.sources.NAME.images.tiles": "unit/data/documents/test_variants.py",
    "data.sources.NAME.images.scaled_decode": "unit/data/documents/test_variants.py",
    "data.sources.NAME.image_folder": "unit/data/sources/test_pictures.py",
    "data.sources.NAME.image_range": "unit/processing/test_levels.py",
    "data.sources.NAME.variants": "unit/data/documents/test_variants.py",
    "data.index_dir": "unit/data/index/test_shard_index.py",
    "data.auto_index_limit": "unit/data/index/test_catalogue.py",
    "data.sources.NAME.loss_weight": "unit/training/test_loss_weights.py",
    "data.cost.measured": "distributed/test_pack_times.py",
    "data.packing_pool": "unit/data/loading/test_stream_loader.py",
    "data.long_conversations": "unit/data/plan/test_left_out.py",
    "stages.N.name": "unit/commands/test_stages.py",
    "stages.N.experiment": "unit/commands/test_stages.py",
    "stages.N.overrides": "unit/commands/test_stages.py",
    "stage": "unit/commands/test_stages.py",
    "optimizer.start": "unit/commands/test_stages.py",
    "launch.attempts": "unit/commands/test_slurm_jobs.py",
    "launch.chain": "unit/commands/test_slurm_jobs.py",
    "launch.exclude_bad_nodes": "unit/commands/test_slurm_jobs.py",
    "scale": "end_to_end/test_recipes.py",
    "data.holdout": "unit/data/index/test_part.py",
    "data.sources.NAME.held_out": "unit/data/index/test_part.py",
    "data.max_dropped_fraction": "unit/data/plan/test_left_out.py",
    "data.shuffle_window": "unit/data/plan/test_amplification.py",
    "data.epochs": "unit/data/plan/test_plan.py",
    "data.max_bad_fraction": "unit/inspection/test_validate.py",
    "freeze.rules.N.trainable": "unit/training/test_adapters.py",
    "freeze.frozen_dtype": "unit/training/test_precision.py",
    "adapter.rank_pattern": "unit/training/checkpoints/test_adapter_settings.py",
    "adapter.alpha_pattern": "unit/training/checkpoints/test_adapter_settings.py",
    "adapter.from_config": "unit/training/checkpoints/test_adapter_settings.py",
    "adapter.quantize": "unit/training/test_adapters.py",
    "optimizer.name": "unit/training/test_optim.py",
    "trainer.epochs": "unit/training/test_lengths.py",
    "trainer.epochs_until": "unit/training/test_lengths.py",
    "trainer.eval_first": "unit/training/test_lengths.py",
    "trainer.benchmarks": "unit/evaluation/benchmarks/test_training.py",
    "trainer.benchmark_data": "unit/evaluation/benchmarks/test_training.py",
    "trainer.benchmark_weights": "unit/evaluation/benchmarks/test_training.py",
    "trainer.best.metric": "unit/training/test_lengths.py",
    "trainer.best.mode": "unit/training/test_lengths.py",
    "trainer.early_stopping.patience": "unit/training/test_lengths.py",
    "trainer.early_stopping.metric": "unit/training/test_lengths.py",
    "trainer.early_stopping.mode": "unit/training/test_lengths.py",
    "trainer.early_stopping.min_change": "unit/training/test_lengths.py",
    "schedule.warmup_fraction": "unit/training/test_lengths.py",
    "optimizer.arguments": "unit/training/test_lengths.py",
    "trainer.batch_ramp.start": "unit/training/checkpoints/test_going_on.py",
    "trainer.precision": "unit/training/test_precision.py",
    "trainer.gradient_checkpointing": "unit/training/test_step.py",
    "trainer.compile": "unit/training/test_compiling.py",
    "trainer.async_checkpoint": "unit/training/checkpoints/test_save.py",
    "trainer.max_skipped_in_a_row": "unit/training/test_trainer.py",
    "trainer.skip_outliers": "unit/training/test_no_sync.py",
    "trainer.max_hours": "unit/training/test_trainer.py",
    "trainer.neftune_alpha": "unit/training/test_no_sync.py",
    "trainer.worst_batch_first": "unit/training/test_worst_batch.py",
    "trainer.deterministic": "unit/test_starting_points.py",
    "trainer.hang_timeout": "unit/training/test_heartbeat.py",
    "export.folder": "unit/commands/test_export.py",
    "export.max_shard_size": "unit/commands/test_export.py",
    "export.adapters": "unit/commands/test_export.py",
    "export.license": "unit/commands/test_model_card.py",
    "logging.trackers": "unit/training/test_trackers.py",
    "logging.first_packs": "unit/training/test_trackers.py",
    "logging.wandb.mode": "unit/training/test_wandb.py",
    "logging.wandb.entity": "unit/training/test_wandb.py",
    "logging.wandb.project": "unit/training/test_wandb.py",
    "logging.wandb.group": "unit/training/test_wandb.py",
    "logging.wandb.job_type": "unit/training/test_wandb.py",
    "logging.wandb.name": "unit/training/test_wandb.py",
    "logging.wandb.id": "unit/training/test_wandb.py",
    "logging.wandb.tags": "unit/training/test_wandb.py",
    "logging.wandb.notes": "unit/training/test_wandb.py",
    "logging.wandb.dir": "unit/training/test_wandb.py",
    "logging.wandb.resume": "unit/training/test_wandb.py",
    "logging.wandb.save_code": "unit/training/test_wandb.py",
    "logging.wandb.artifacts": "unit/training/test_wandb.py",
    "logging.wandb.by_reference": "unit/training/test_wandb.py",
}
# key -> why nothing here can see it
NOT_SEEN: dict[str, str] = {
    "name": "names the run in its default run_dir, in W&B and on the model card",
    "run_dir": "where every file of a run goes: each run of these tests has one",
    "data.root": "where data.prepare writes, and what paths of sources may refer to",
    "data.prepare": "builds the data before anything is read; the demo's tests run it",
    "data.cache_dir": "keeps blocks of object stores on disk; the data are the same",
    "data.cache_size": "how much of them is kept; the data are the same",
    "data.cost.squared": "which rank gets a pack: here there is one",
    "data.cost.frame": "which rank gets a pack: here there is one",
    "data.num_workers": "processes that read; the data are the same, as the tests of the loader see",
    "data.prefetch_steps": "steps held ready; the data are the same",
    "data.sources.NAME.where": "which rows of a table are read: no tar has columns",
    "logging.console": "what is printed while a run goes on",
    "evaluation.model": "what `m4train evaluate` evaluates",
    "evaluation.metric": "how `m4train evaluate` scores answers, as the tests of the engines see",
    "evaluation.metrics": "how `m4train evaluate` scores the answers of one source",
    "evaluation.batch_size": "answers made together: the same ones, at another speed",
    "evaluation.max_samples": "how many samples `m4train evaluate` answers",
    "evaluation.shown": "how many answers a run shows while it trains, as the tests of the engines see",
    "export.verify": "whether an export is read again: the folder is the same",
    "export.model_card": "whether an export has a README.md",
    "export.dtype": "of the weights of an export",
    "engine.name": "the same steps on more processes, as the tests of the engines see",
}


def changed(key: str, value: str, data: Path) -> list[str]:
    """The overrides that set a key to `value`; in a source, that of talks, or of pages for the options of documents."""
    source = PAGES if ".documents." in key else TALKS
    if value.startswith(("RULE ", "PART ")):
        return [f"freeze.rules=[{value[5:]}]" if value.startswith("RULE") else f"optimizer.parts={value[5:]}"]
    if value == "OTHER":
        value = str(tokenizer_folder(400)) if key == "model.tokenizer" else f"{data}/pages/*.tar"
    return [f"{key.replace('data.sources.NAME', source)}={value}"]


def configured(data: Path, run_dir: Path, overrides: list[str]) -> Config:
    config = load_config([*base(data), f"run_dir={run_dir}", *overrides])
    config.data.sources = {name: source for name, source in config.data.sources.items() if name in ("talks", "pages")}
    config.data.validation = {"held": config.data.validation["held"]}
    return config


@cache
def unchanged(see: Callable[[Config], Any], also: tuple[str, ...], data: Path) -> Any:
    """What is seen without the other value, and nothing else makes a difference."""
    folder = data / f"{see.__name__}-{hashlib.sha256(repr(also).encode()).hexdigest()}"
    first, again = (see(configured(data, folder / name, [*also])) for name in ("first", "again"))
    assert first == again
    return first


@pytest.mark.parametrize("key", ACTS)
def test_another_value_is_seen(key: str, data: Path, tmp_path: Path) -> None:
    see, also, value = ACTS[key]
    assert unchanged(see, tuple(also), data) != see(configured(data, tmp_path, [*also, *changed(key, value, data)]))


@pytest.mark.parametrize("key", REFUSED)
def test_a_value_that_cannot_act_is_refused(key: str, data: Path, tmp_path: Path) -> None:
    overrides, said = REFUSED[key]
    with pytest.raises(ConfigError, match=said):
        configured(data, tmp_path, overrides)


def test_every_key_is_in_one_of_the_tables() -> None:
    tables = [set(ACTS), set(REFUSED), set(SHOWN), set(NOT_SEEN)]
    keys = {key.name for key in all_keys() if not key.group}
    assert set.union(*tables) == keys
    assert sum(map(len, tables)) == len(keys)


@pytest.mark.parametrize("key", SHOWN)
def test_the_tests_elsewhere_name_the_key(key: str) -> None:
    assert re.search(rf"\b{key.rpartition('.')[2]}\b", (ROOT / "tests" / SHOWN[key]).read_text(encoding="utf-8"))
