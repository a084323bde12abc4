"""What the commands do with a configuration: train, evaluate, data."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from m4train import build
from m4train.compose import save_config
from m4train.config import Config, SourceConfig
from m4train.data.source import build_sources, conversations, index_sources, source_stats
from m4train.errors import CheckpointError, ConfigError
from m4train.evaluation.generation import Answer, answer_conversations, score
from m4train.training.callbacks import default_callbacks
from m4train.training.checkpoint import load_checkpoint
from m4train.training.engines import make_engine
from m4train.training.engines.single import SingleEngine
from m4train.training.parts_table import parameter_table
from m4train.training.resume import Checkpoint, agreed_checkpoint, find_checkpoint
from m4train.training.trainer import Trainer

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels whenever peft is imported

PICTURED_ANSWERS = 120  # per source: answers kept with their images


def train(config: Config) -> int:
    """Trains, or continues, the run of `config`; returns 0."""
    _set_threads(config)
    engine = make_engine(config)
    run_dir = Path(config.run_dir)
    resume = agreed_checkpoint(config, engine)
    if resume is not None and resume.step >= config.trainer.max_steps:
        if engine.rank == 0:
            print(f"{run_dir} is trained already: {resume.folder.name} is its last step.")
        engine.shutdown()
        return 0
    if engine.rank == 0:
        build.prepare_data(config.data)
    engine.barrier()
    processor = build.build_processor(config)
    model = build.build_model(config, processor)
    data = build.build_data(config, processor, engine.rank, engine.world_size)
    if engine.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
        table = [dataclasses.asdict(row) for row in parameter_table(model, config)]
        (run_dir / "parameters.json").write_text(json.dumps(table, indent=1) + "\n")
    trainer = Trainer(
        config,
        model,
        data.steps(resume),
        engine,
        default_callbacks(config),
        validation=data.validation_steps if data.validation else None,
        resume=resume,
        save_extra=lambda folder: describe_model(folder, model, processor),
        quarantined=lambda: data.quarantine.bad,
    )
    trainer.train()
    engine.shutdown()
    return 0


def evaluate(config: Config) -> int:
    """Answers the held-out conversations of data.validation; writes evaluation.json and answers.jsonl into run_dir."""
    if not config.data.validation:
        raise ConfigError("data.validation is empty: name held-out sources of conversations to evaluate on.")
    _set_threads(config)
    model, processor, checkpoint = _trained(config)
    sources = build_sources(config.data.validation, config.data, processor)
    scores: dict[str, Any] = {}
    lines: list[str] = []
    for source in sources:
        unreadable: list[str] = []
        asked = conversations(source, unreadable)
        answers = list(answer_conversations(model, processor, asked, config.evaluation))
        if not answers:
            raise ConfigError(f"data.validation.{source.name} holds no conversation: evaluation asks questions.")
        scores[source.name] = score(answers)
        lines += [json.dumps(_answer_line(source.name, answer, n)) for n, answer in enumerate(answers)]
        result = scores[source.name]
        if unreadable:
            result["unreadable"] = len(unreadable)
            print(f"{source.name}: {len(unreadable)} samples could not be read: {', '.join(unreadable[:5])}")
        print(f"{source.name}: exact match {result['exact_match']:.1%} of {result['count']} ({checkpoint.folder.name})")
    run_dir = Path(config.run_dir)
    (run_dir / "answers.jsonl").write_text("\n".join(lines) + "\n")
    (run_dir / "evaluation.json").write_text(json.dumps(scores, indent=1) + "\n")
    return 0


def _answer_line(source: str, answer: Answer, number: int) -> dict[str, Any]:
    images = [_data_uri(image) for image in answer.images] if number < PICTURED_ANSWERS or not answer.correct else []
    names = ("key", "question", "answer", "reference", "correct")
    return {"source": source, **{name: getattr(answer, name) for name in names}, "images": images}


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def index_data(config: Config) -> int:
    """Builds what is missing or stale of the indexes of all sources, with a progress bar; an interrupted build goes on."""
    from rich.progress import Progress

    build.prepare_data(config.data)
    processor = build.build_processor(config)
    with Progress() as progress:
        for name, source in _all_sources(config).items():
            task = progress.add_task(name)
            index_sources(
                {name: source},
                config.data,
                processor,
                lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )
    return 0


def stats_data(config: Config) -> int:
    """Prints what every source holds, as JSON, from the indexes alone."""
    build.prepare_data(config.data)
    processor = build.build_processor(config)
    sources = build_sources(_all_sources(config), config.data, processor)
    print(json.dumps({source.name: source_stats(source) for source in sources}, indent=1))
    return 0


def _all_sources(config: Config) -> dict[str, SourceConfig]:
    held_out = {f"validation/{name}": source for name, source in config.data.validation.items()}
    return {**config.data.sources, **held_out}


def _trained(config: Config) -> tuple[Any, Any, Checkpoint]:
    """Model in evaluation mode and processor, as of the newest checkpoint of run_dir."""
    checkpoint = find_checkpoint(config)
    if checkpoint is None:
        raise CheckpointError(f"{config.run_dir} holds no checkpoint: train first, or set run_dir to a trained run.")
    build.prepare_data(config.data)
    processor = build.build_processor(config)
    model = build.build_model(config, processor)
    engine = SingleEngine(config)
    engine.prepare(model)
    load_checkpoint(checkpoint, engine)
    return model.eval(), processor, checkpoint


def describe_model(folder: Path, model: Any, processor: Any) -> None:
    """Everything of a Hugging Face folder but the weights: configuration, tokenizer, processor, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(model.generation_config, indent=2) + "\n")
    processor.save_pretrained(folder)


def _set_threads(config: Config) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
