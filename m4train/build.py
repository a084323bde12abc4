"""The only place where configuration becomes objects."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from m4train.batch import PackedBatch
from m4train.config import Config, DataConfig, SourceConfig
from m4train.contracts import require_members
from m4train.data.documents.image_layout import Frames, image_layout
from m4train.data.loading.collate import Collator
from m4train.data.loading.loader import Loader, StepBatch, validation_steps
from m4train.data.loading.quarantine import Quarantine
from m4train.data.loading.stream_loader import StreamLoader
from m4train.data.plan.left_out import check_left_out, left_out, left_out_lines
from m4train.data.plan.plan import Plan
from m4train.data.plan.varied import shape_of, varied_packs
from m4train.data.source import Source, build_sources
from m4train.errors import ConfigError
from m4train.families import FAMILIES, Family
from m4train.hub import PROCESSOR_FILES, WEIGHT_FILES, model_folder
from m4train.processing.processor import END_OF_UTTERANCE, FAKE, IMAGE
from m4train.processing.protocol import SampleProcessor
from m4train.restore import merged_model
from m4train.run_files import QUARANTINE, STATE
from m4train.stops import stop_ids
from m4train.terminal import stage
from m4train.training.checkpoints.adapter_files import start_adapter
from m4train.training.checkpoints.files import start_folder
from m4train.training.checkpoints.state import Checkpoint, open_checkpoint
from m4train.training.compiling import compile_blocks, compiles, traced_whole
from m4train.training.equip import equip
from m4train.training.model_protocol import TrainableModel
from m4train.training.new_tokens import add_tokens, give_rows


def prepare_data(data: DataConfig) -> None:
    """Builds the dataset of data.prepare under data.root if it is not there yet; several processes may call it."""
    if data.prepare is None:
        return
    module_name, _, function_name = data.prepare.partition(":")
    try:
        prepare = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.prepare is {data.prepare!r}, which cannot be loaded ({error}).") from error
    stage(f"making the data in {data.root}")
    if prepare(Path(data.root)):
        print(f"data: built {data.root} ({data.prepare})", flush=True)


def _family(config: Config) -> Family:
    return FAMILIES[config.model.family]


def prepared_processor(config: Config) -> Any:
    """The processor, after the dataset of data.prepare was built: what commands that only look at data begin with."""
    prepare_data(config.data)
    return build_processor(config)


def all_sources(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources of training, and the held-out ones as `validation/NAME`."""
    return {**data.sources, **{held_out_name(name): source for name, source in data.validation.items()}}


def held_out_name(name: str) -> str:
    """What a source of data.validation is called among all sources."""
    return f"validation/{name}"


def build_processor(config: Config) -> SampleProcessor:
    """The processor of model.pretrained, or one made of model.tokenizer and model.processor."""
    stage("reading the tokenizer")
    tokenizer = config.model.tokenizer
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.tokenizer is {tokenizer}, which holds no tokenizer.json: name a folder that does (another data=... may have "
            "changed data.root, which an experiment's tokenizer is looked for in)."
        )
    processor = _processor(config)
    require_members(processor, SampleProcessor, "The processor")
    images: Any = getattr(processor, "image_processor", None)
    if getattr(images, "backend", "") is None:  # neither the folder nor model.processor.backend says what resizes
        processor.image_processor = images.replace(backend="auto")
    add_tokens(processor.tokenizer, list(config.model.texts_of_added))
    return processor


def _processor(config: Config) -> Any:
    kind, model = _family(config).load("Processor"), config.model
    if model.pretrained is not None:
        folder = start_folder(model.pretrained)
        if not model.processor:
            return kind.from_pretrained(folder, tokenizer_folder=model.tokenizer)
        _check_agreement(model.processor, kind.settings_for(pretrained_architecture(config)))
        return kind.from_pretrained(folder, tokenizer_folder=model.tokenizer, **model.processor)
    assert model.tokenizer is not None  # checked with the configuration
    assembled = _assembled(config, {}, 0) if model.vision_pretrained else None
    implied = kind.settings_for(assembled or _family(config).load("Config").from_dict(model.architecture))
    _check_agreement(model.processor, implied)
    return kind.from_settings(model.tokenizer, {**model.processor, **implied})


def _check_agreement(settings: dict[str, Any], implied: dict[str, int]) -> None:
    """Raises ConfigError for a setting of the processor that the model does not follow."""
    for name, value in implied.items():
        if settings.get(name, value) != value:
            raise ConfigError(
                f"model.processor.{name} is {settings[name]}, but the model takes {value}: leave it out, or change the model."
            )


def _backbones(config: Config) -> tuple[Path, Path]:
    model = config.model
    assert model.vision_pretrained is not None  # checked with the configuration
    assert model.text_pretrained is not None
    return model_folder(model.vision_pretrained, WEIGHT_FILES), model_folder(model.text_pretrained, WEIGHT_FILES)


def _assembled(config: Config, own: dict[str, Any], tokens: int) -> Any:
    """The configuration of a model made of two backbones, with the keys of `own` and a row for each of `tokens` ids."""
    from m4train.models.assemble import assembled_config

    kind, folders = _family(config).model_class, _backbones(config)
    given = {**config.model.architecture, **own}
    plain = assembled_config(kind, *folders, **given)
    return assembled_config(kind, *folders, added_tokens=max(0, tokens - plain.token_rows), **given)


def pretrained_architecture(config: Config) -> Any:
    """The configuration of the model that model.pretrained names."""
    assert config.model.pretrained is not None
    folder = model_folder(start_folder(config.model.pretrained), PROCESSOR_FILES)
    return _family(config).load("Config").from_pretrained(folder)


def build_architecture(config: Config, processor: SampleProcessor) -> Any:
    """The model's configuration: that of model.pretrained, or model.architecture with the ids of the processor.

    If the architecture gives no vocab_size, the model gets an embedding for every entry of the tokenizer, of which
    the last additional_vocab_size (Idefics) are in a table of their own.
    """
    if config.model.pretrained is not None:
        return pretrained_architecture(config)
    kind = _family(config).load("Config")
    given, names = config.model.architecture, {field.name for field in fields(kind)}
    if config.model.vision_pretrained is not None:
        own: dict[str, Any] = dict(_special_ids(processor))
        if "text_config" in names:
            text = {**own, **given.get("text_config", {})}
            own = {**own, "image_token_id": processor.image_token_id, "text_config": text}
        return _assembled(config, own, len(processor.tokenizer))
    rows = {"vocab_size": len(processor.tokenizer) - given.get("additional_vocab_size", 0)}
    if "text_config" not in names:
        return kind.from_dict({**rows, **_special_ids(processor), **given})
    text = {**rows, **_special_ids(processor), **given.get("text_config", {})}
    own = {"image_token_id": processor.image_token_id, **_special_ids(processor)}
    return kind.from_dict({**given, **own, "text_config": text})


def _special_ids(processor: SampleProcessor) -> dict[str, int | None]:
    return {"pad_token_id": processor.pad_id, "bos_token_id": processor.bos_id, "eos_token_id": processor.eos_id}


def build_model(config: Config, processor: SampleProcessor) -> TrainableModel:
    """The model with its weights, adapters and freezing rules; the same random weights for the same seed.

    Raises ConfigError if the tokenizer has more entries than the model has embeddings, or a rule matches nothing.
    """
    stage("making the model" if config.model.pretrained is None else f"reading the model {config.model.pretrained}")
    kind = _family(config).model_class
    if config.model.pretrained is None:
        model = _fresh_model(kind, config, processor)
    else:
        model = _started_model(kind, start_folder(config.model.pretrained))
    require_members(model, TrainableModel, "The model")
    model.loss_kind = config.model.loss
    own = [] if config.model.pretrained is None else [FAKE, IMAGE, END_OF_UTTERANCE]
    first_new = give_rows(model, processor.tokenizer, config.model.texts_of_added, own)
    _check_fit(model, processor, config)
    model.generation_config = generation_config(model, processor)
    equip(model, config, first_new if config.freeze.new_rows_from is None else config.freeze.new_rows_from)
    if config.adapter.start_from is not None:
        start_adapter(model, Path(config.adapter.start_from), config.adapter)
    if compiles(config):
        compile_blocks(model.blocks(), whole=traced_whole(config.adapter))
    return model


def _check_fit(model: Any, processor: SampleProcessor, config: Config) -> None:
    """Raises ConfigError for a tokenizer that is not of the model, and warns of packs longer than it was trained for."""
    known = getattr(model.config, "image_token_id", processor.image_token_id)
    if known != processor.image_token_id:
        raise ConfigError(
            f"The tokenizer gives <image> the id {processor.image_token_id}, but the model's config.json {known}: leave "
            "model.tokenizer out, or name the tokenizer that belongs to the model."
        )
    trained = model.config.get_text_config().max_position_embeddings
    if trained < config.data.sequence_length:
        # No text model here learns its positions: beyond the ones it saw it works, but less well.
        warnings.warn(
            f"data.sequence_length is {config.data.sequence_length}, but max_position_embeddings of the model {trained}: documents "
            "longer than that take positions it was not trained for; lower data.sequence_length, or scale its rope",
            stacklevel=2,
        )


def _fresh_model(kind: Any, config: Config, processor: SampleProcessor) -> Any:
    architecture, generator = build_architecture(config, processor), torch.Generator().manual_seed(config.seed)
    if config.model.vision_pretrained is not None:
        from m4train.models.assemble import fill_from_backbones

        return fill_from_backbones(kind(architecture), *_backbones(config), generator=generator)
    model = kind(architecture)
    model.init_weights(generator)
    return model


def _started_model(kind: Any, folder: str) -> Any:
    """The model of a Hugging Face folder, or of a checkpoint with what its adapters learned merged."""
    if not (Path(folder) / STATE).is_file():
        return kind.from_pretrained(folder)
    return merged_model(open_checkpoint(Path(folder)))


def generation_config(model: Any, processor: SampleProcessor) -> dict[str, Any]:
    """What generation_config.json says: that of the model it started from, ended by a turn's end as well as a text's."""
    ends = stop_ids(processor, model.stated_ends)
    return {**_special_ids(processor), **model.generation_config, "eos_token_id": ends}


def build_layout(config: Config, processor: SampleProcessor) -> Frames:
    """How the model takes the images of a batch."""
    return image_layout(_family(config).image_layout, build_architecture(config, processor), processor)


def build_plan(config: Config, processor: SampleProcessor) -> Plan:
    """The plan of a run: what it will see, in which order. Raises what its parts raise for unusable shards and indexes."""
    trainer = config.trainer
    sources = build_sources(config.data.sources, config.data, processor)
    return Plan(sources, config.data, config.seed, trainer.global_batch_size, trainer.batch_ramp)


def varied_batches(
    config: Config, plan: Plan, processor: SampleProcessor, state: dict[str, Any] | None
) -> list[tuple[tuple[int, ...], PackedBatch]]:
    """Micro-batches that differ as much as those of a run do, from its first steps after `state`, and what they are timed by."""
    collator = Collator(plan.sources, processor, config.data, config.seed, build_layout(config, processor))
    groups = varied_packs(plan, state, config.trainer.micro_batch_size)
    return [(shape_of(packs), collator.batch(packs, 0)[0]) for packs in groups]


@dataclass(frozen=True)
class RunData:
    """The data side of a run on one rank."""

    plan: Plan | None  # None if the sources are streamed
    validation: list[Source]
    quarantine: Quarantine
    steps: Callable[[Checkpoint | None], Iterator[StepBatch]]
    validation_steps: Callable[[], Iterator[StepBatch]]


def build_validation(
    config: Config, processor: SampleProcessor, layout: Frames, rank: int, world_size: int
) -> tuple[list[Source], Callable[[], Iterator[StepBatch]]]:
    """The held-out sources, and fresh passes over them: equally many micro-batches on every rank."""
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    place |= {"micro_batch_size": config.trainer.micro_batch_size, "layout": layout}
    sources = build_sources(config.data.validation, config.data, processor)
    return sources, lambda: iter(validation_steps(sources, processor, config.data, **place))


def build_data(
    config: Config, processor: SampleProcessor, rank: int, world_size: int, plan: Plan | None = None
) -> RunData:
    """Sources, plan and loaders; raises what their parts raise for unusable shards, indexes and weights."""
    data, micro = config.data, config.trainer.micro_batch_size
    streamed = any(source.stream for source in data.sources.values())
    plan = None if streamed else plan or build_plan(config, processor)
    layout = build_layout(config, processor)
    validation, held_out = build_validation(config, processor, layout, rank, world_size)
    lost = [] if plan is None else [left_out(source, data) for source in plan.sources]
    lost += [replace(found, source=held_out_name(found.source)) for found in (left_out(s, data) for s in validation)]
    if rank == 0:
        print(*left_out_lines(lost), sep="\n", end="\n" * any(each.long for each in lost), flush=True)
    check_left_out(lost, data)
    max_too_long = data.max_dropped_fraction if streamed else None
    quarantine = Quarantine(Path(config.run_dir) / QUARANTINE, data.max_bad_fraction, max_too_long)
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro_batch_size": micro, "layout": layout}

    def steps(resume: Checkpoint | None) -> Iterator[StepBatch]:
        state = resume.plan if resume else None
        stop = config.trainer.max_steps
        settings = {"seed": config.seed, "state": state, "stop_step": stop, **place}
        loader: Loader | StreamLoader
        if plan is None:
            packs = config.trainer.global_batch_size
            loader = StreamLoader(data.sources, processor, data, global_batch_size=packs, **settings)
        else:
            loader = Loader(plan, processor, data, **settings)
        for step in loader:
            quarantine.used.update({name: counted["documents"] for name, counted in step.counts().items()})
            quarantine.add(step.bad, step.documents)
            yield step

    return RunData(plan, validation, quarantine, steps, held_out)
