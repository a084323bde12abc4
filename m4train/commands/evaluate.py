"""`m4train evaluate`: held-out loss and scored answers of a checkpoint or a Hugging Face folder, under any engine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from m4train import build
from m4train.config import Config, ModelConfig
from m4train.config.packages import check_packages
from m4train.data.documents.image_layout import image_layout
from m4train.errors import CheckpointError, ConfigError
from m4train.evaluation.answers import answer_lines, answers_of, decoding_of, in_order, metric_of, scores_of
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.metrics.registry import load_metric, metric_name
from m4train.evaluation.metrics.said import Scores
from m4train.families import FAMILIES
from m4train.json_files import read_mapping
from m4train.restore import restore_model, restore_processor
from m4train.run_files import ANSWERS, EVALUATION, shown_score
from m4train.terminal import stage
from m4train.training.callbacks.tracker import make_trackers
from m4train.training.checkpoints.changes import MODEL_KEYS
from m4train.training.checkpoints.find import agreed_checkpoint
from m4train.training.engines import make_engine
from m4train.training.engines.base import Engine
from m4train.training.heartbeat import Heartbeat
from m4train.training.held_out import held_out_loss

PICTURED_ANSWERS = 120  # per source: answers kept with their images, in addition to all that score less than 1


@dataclass(frozen=True)
class Subject:
    """What is evaluated, with the configuration that fits it, and how results call it."""

    config: Config
    model: Any
    processor: Any
    name: str


def evaluate(config: Config) -> int:
    """Writes evaluation.json (per source: loss, score, counts) and answers.jsonl into run_dir; returns 0."""
    evaluated(config)
    return 0


def evaluated(config: Config) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Does so, and returns what the two files hold; on other ranks than the first, nothing."""
    if not config.data.validation:
        raise ConfigError("data.validation is empty: name held-out sources to evaluate on.")
    for name in config.data.validation:
        load_metric(metric_of(config, name))  # a wrong name is answered before anything is loaded
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    engine = make_engine(config)
    with Heartbeat(Path(config.run_dir), engine.rank, engine.world_size, config.trainer.hang_timeout) as heart:
        found = _evaluate(config, engine, heart)
    engine.shutdown()
    return found


def _evaluate(
    config: Config, engine: Engine, heart: Heartbeat
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    heart.beat("data")
    if engine.rank == 0:
        build.prepare_data(config.data)
    engine.barrier()
    heart.beat("model")
    subject = _subject(config, engine)
    engine.place(subject.model)
    heart.beat("index")
    layout = image_layout(FAMILIES[subject.config.model.family].image_layout, subject.model.config, subject.processor)
    sources, steps = build.build_validation(config, subject.processor, layout, engine.rank, engine.world_size)
    stage("held-out loss")
    entering = lambda batch: heart.beat("evaluation", batch=batch)
    losses = held_out_loss(engine, steps(), [source.name for source in sources], entering)
    decoding = decoding_of(config, subject.model, subject.processor)
    if engine.rank == 0:
        print(decoding.line(), flush=True)
    scores: dict[str, dict[str, Any]] = {}
    lines: list[dict[str, Any]] = []
    for source in sources:
        unreadable: list[str] = []
        stage(f"answering the questions of {source.name}")
        answers = answers_of(
            source, engine, subject.model, subject.processor, config, decoding, None, unreadable, heart
        )
        gathered = in_order(answer for part in engine.gather(answers) for answer in part)
        missed = [sample for part in engine.gather(unreadable) for sample in part]
        if engine.rank == 0:
            scored = scores_of(config, source.name, gathered) if gathered else None
            scores[source.name] = _result(config, source.name, scored, missed, losses, decoding)
            if scored is not None:
                lines += answer_lines(config, source.name, gathered, scored, PICTURED_ANSWERS, decoding)
    stage(None)
    if engine.rank == 0:
        _write(Path(config.run_dir), scores, lines, subject.name)
        _tell(config, subject.name, scores, lines)
    return scores, lines


def _subject(config: Config, engine: Engine) -> Subject:
    """Model in evaluation mode and processor: of evaluation.model, or of the checkpoint the run would continue from."""
    folder = config.evaluation.model
    if folder is not None:
        family = _family(Path(folder), config.model.family)
        start = ModelConfig(family=family, pretrained=folder, loss=config.model.loss)
        changed = replace(config, model=start)
        model = FAMILIES[family].model_class.from_pretrained(folder)
        return Subject(changed, model, build.build_processor(changed), folder)
    stage("reading the checkpoint")
    checkpoint = agreed_checkpoint(config, engine, among=MODEL_KEYS)
    if checkpoint is None:
        raise CheckpointError(
            f"{config.run_dir} holds no checkpoint: train first, set run_dir to a trained run, or evaluation.model to a "
            "Hugging Face folder."
        )
    model = restore_model(config, checkpoint.folder)
    return Subject(config, model, restore_processor(config, checkpoint.folder), checkpoint.folder.name)


def _family(folder: Path, default: str) -> str:
    """The family whose model a folder holds; a hub id is taken to hold that of the configuration."""
    path = folder / "config.json"
    family = read_mapping(path).get("model_type") if path.is_file() else default
    if family not in FAMILIES:
        raise ConfigError(f"{path} has model_type {family!r}, but m4train knows {', '.join(FAMILIES)}.")
    return family


def _result(
    config: Config,
    source: str,
    scored: Scores | None,
    unreadable: list[str],
    losses: dict[str, Any],
    decoding: Decoding,
) -> dict[str, Any]:
    """What evaluation.json says of one source."""
    result: dict[str, Any] = {}
    if f"loss/{source}" in losses:
        result |= {"loss": losses[f"loss/{source}"], "loss_tokens": losses[f"loss_tokens/{source}"]}
    if scored is not None:
        result |= stated_scores(metric_name(metric_of(config, source)), scored) | {"decoding": decoding.stated()}
    if unreadable:
        result["unreadable"] = len(unreadable)
        print(f"{source}: {len(unreadable)} samples could not be read: {', '.join(unreadable[:5])}")
    return result


def stated_scores(metric: str, scored: Scores) -> dict[str, Any]:
    """What results keep of the scores by a metric."""
    interval = [round(bound, 4) if math.isfinite(bound) else None for bound in scored.interval]
    stated = {"metric": metric, metric: round(scored.value, 4), "interval": interval, "count": len(scored.samples)}
    if scored.shown_times != 100:
        stated["shown_times"] = scored.shown_times  # not a share, to be shown as a percentage
    return stated | scored.counts | {name: round(value, 4) for name, value in scored.others.items()}


def _tell(config: Config, name: str, scores: dict[str, dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Gives the results to the trackers; one that is not within reach is said, since the files are written."""
    try:
        check_packages(config, ("logging",))
        for tracker in make_trackers(config):
            tracker.on_evaluation(name, scores, lines)
    except ConfigError as error:
        print(f"The results are in {config.run_dir} alone: {error}", flush=True)


def _write(run_dir: Path, scores: dict[str, dict[str, Any]], lines: list[dict[str, Any]], name: str) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / EVALUATION).write_text(json.dumps(scores, indent=1) + "\n")
    for source, result in scores.items():
        loss = f"loss {result['loss']:.4f}" if "loss" in result else "no loss token"
        scored = ""
        if "metric" in result:
            scored = f", {result['metric'].replace('_', ' ')} {shown_score(result)} of {result['count']}"
        print(f"{source}: {loss}{scored} ({name})")
