"""The only place where configuration becomes objects."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m4train.config import Config, DataConfig
from m4train.data.loader import Loader, StepBatch, validation_steps
from m4train.data.plan import Plan
from m4train.data.quarantine import Quarantine
from m4train.data.source import Source, build_sources
from m4train.errors import ConfigError
from m4train.processing.tokenizer import Tokenizer
from m4train.training.adapters import apply_adapters
from m4train.training.freezing import apply_freezing
from m4train.training.resume import Checkpoint


@dataclass(frozen=True)
class Family:
    """The classes of one model family, by name: `build` loads the modules that hold them."""

    config: str
    model: str
    processor: str
    image_processor: str


FAMILIES = {
    "idefics3": Family(
        "Idefics3Config", "Idefics3ForConditionalGeneration", "Idefics3Processor", "Idefics3ImageProcessor"
    ),
    "smolvlm": Family("SmolVLMConfig", "SmolVLMForConditionalGeneration", "SmolVLMProcessor", "SmolVLMImageProcessor"),
}


def _public(name: str) -> Any:
    return getattr(importlib.import_module("m4train"), name)


def prepare_data(data: DataConfig) -> None:
    """Builds the dataset of data.prepare under data.root where it is not there yet; several processes may call it."""
    if data.prepare is None:
        return
    module_name, _, function_name = data.prepare.partition(":")
    try:
        prepare = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.prepare is {data.prepare!r}, which cannot be loaded ({error}).") from error
    if prepare(Path(data.root)):
        print(f"data: built {data.root} ({data.prepare})", flush=True)


def build_processor(config: Config) -> Any:
    """The processor of model.pretrained, or one made of model.tokenizer and model.processor."""
    family = FAMILIES[config.model.family]
    if config.model.pretrained is not None:
        return _public(family.processor).from_pretrained(config.model.pretrained)
    assert config.model.tokenizer is not None  # checked with the configuration
    image_processor = _public(family.image_processor)(**config.model.processor)
    tokenizer = Tokenizer.from_pretrained(config.model.tokenizer)
    return _public(family.processor)(image_processor, tokenizer, image_seq_len=_tokens_per_frame(config))


def _tokens_per_frame(config: Config) -> int:
    architecture = config.model.architecture
    vision = architecture["vision_config"]
    return (vision["image_size"] // vision["patch_size"] // architecture.get("scale_factor", 2)) ** 2


def build_model(config: Config, processor: Any) -> torch.nn.Module:
    """The model with its weights, adapters and freezing rules; the same random weights for the same seed.

    Raises ConfigError where the tokenizer has more entries than the model has embeddings, or a rule matches nothing.
    """
    model = _pretrained_model(config) if config.model.pretrained is not None else _fresh_model(config, processor)
    rows = model.config.text_config.vocab_size
    if len(processor.tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer has {len(processor.tokenizer)} entries but the model {rows} embeddings: "
            "use the tokenizer that belongs to the model."
        )
    torch.manual_seed(config.seed)  # adapters draw their first weights from the global generator
    apply_adapters(model, config.adapter)
    apply_freezing(model, config.freeze)
    return model


def _pretrained_model(config: Config) -> Any:
    return _public(FAMILIES[config.model.family].model).from_pretrained(config.model.pretrained)


def _fresh_model(config: Config, processor: Any) -> Any:
    family = FAMILIES[config.model.family]
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": processor.pad_id, "bos_token_id": processor.bos_id, "eos_token_id": processor.eos_id}
    architecture = {**config.model.architecture, "image_token_id": processor.image_token_id, **ids}
    architecture["text_config"] = {"vocab_size": len(tokenizer), **ids, **architecture.get("text_config", {})}
    model = _public(family.model)(_public(family.config).from_dict(architecture))
    model.init_weights(torch.Generator().manual_seed(config.seed))
    stops = [token for token in (processor.eos_id, processor.end_of_utterance_id) if token is not None]
    model.generation_config = {**ids, "eos_token_id": stops}
    return model


@dataclass(frozen=True)
class RunData:
    """The data side of a run on one rank."""

    plan: Plan
    validation: list[Source]
    quarantine: Quarantine
    steps: Callable[[Checkpoint | None], Iterator[StepBatch]]
    validation_steps: Callable[[], Iterator[StepBatch]]


def build_data(config: Config, processor: Any, rank: int, world_size: int) -> RunData:
    """Sources, plan and loaders; raises what their parts raise for unusable shards, indexes and weights."""
    data, micro = config.data, config.trainer.micro_batch_size
    sources = build_sources(data.sources, data, processor)
    validation = build_sources(data.validation, data, processor)
    plan = Plan(sources, data, config.seed, config.trainer.global_batch_size)
    quarantine = Quarantine(Path(config.run_dir) / "quarantine.jsonl", data.max_bad_fraction)
    place = {"rank": rank, "world_size": world_size, "micro_batch_size": micro}

    def steps(resume: Checkpoint | None) -> Iterator[StepBatch]:
        state = resume.plan if resume else None
        stop = config.trainer.max_steps
        for step in Loader(plan, processor, data, seed=config.seed, state=state, stop_step=stop, **place):
            quarantine.add(step.bad, step.documents)
            yield step

    def held_out() -> Iterator[StepBatch]:
        return validation_steps(validation, processor, data, **place)

    return RunData(plan, validation, quarantine, steps, held_out)
