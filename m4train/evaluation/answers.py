"""Answers to held-out conversations: asked, scored, and as the lines that reports show. All ranks share the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from m4train.config import Config
from m4train.data.source import Source, conversations
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.generation import Answer, Asked, answer_conversations, every_question, reference_losses
from m4train.evaluation.likelihood import all_ranks
from m4train.evaluation.metrics.registry import load_metric, metric_name
from m4train.evaluation.metrics.said import Scores
from m4train.processing.images import data_uri
from m4train.training.engines.base import Engine
from m4train.training.heartbeat import Heartbeat


def metric_of(config: Config, source: str) -> str:
    return config.evaluation.metrics.get(source, config.evaluation.metric)


def decoding_of(config: Config, model: Any, processor: Any) -> Decoding:
    """How the answers of a run's model are decoded."""
    return Decoding.of(model, processor, config.evaluation.decoding, config.evaluation.max_new_tokens)


def answers_of(
    source: Source,
    engine: Engine,
    model: Any,
    processor: Any,
    config: Config,
    decoding: Decoding,
    limit: int | None,
    unreadable: list[str],
    heart: Heartbeat | None = None,
) -> list[Answer]:
    """This rank's share of the answers to a source's conversations, every world-size-th one.

    At most `limit` samples (or evaluation.max_samples) of the source are looked at. All ranks call it; if they share the
    weights they make the same forward passes. Every sample that is read is a beat of `heart`.
    """
    bounds = [n for n in (len(source), limit, config.evaluation.max_samples) if n is not None]
    numbers = range(engine.rank, min(bounds), engine.world_size)
    together = all_ranks(engine)
    asked = _asked(source, numbers, unreadable, heart)
    place: dict[str, Any] = {"batch_size": config.evaluation.batch_size, "seed": config.seed}
    with engine.autocast():
        if metric_of(config, source.name) == "perplexity":
            size = config.evaluation.batch_size
            return list(reference_losses(model, processor, asked, engine.device, together, batch_size=size))
        return list(answer_conversations(model, processor, asked, decoding, engine.device, together, **place))


def sample_answers(
    sources: Sequence[Source],
    engine: Engine,
    model: Any,
    processor: Any,
    config: Config,
    heart: Heartbeat | None = None,
) -> list[dict[str, Any]]:
    """On rank 0 the lines of a few answers per source, `evaluation.shown`, while a model trains; all ranks call it."""
    lines = []
    decoding = decoding_of(config, model, processor)
    for source in sources:
        answers = answers_of(source, engine, model, processor, config, decoding, config.evaluation.shown, [], heart)
        gathered = in_order(answer for part in engine.gather(answers) for answer in part)
        if gathered:
            scores = scores_of(config, source.name, gathered)
            lines += answer_lines(config, source.name, gathered, scores, len(gathered), decoding)
    return lines


def _asked(source: Source, numbers: Sequence[int], unreadable: list[str], heart: Heartbeat | None) -> Iterator[Asked]:
    for number, key, sample, images in conversations(source, unreadable, numbers):
        if heart is not None:
            heart.beat("generate")
        assert sample.messages is not None
        yield from every_question(Asked(number, key, sample.messages, images, sample.references))


def in_order(answers: Iterable[Answer]) -> list[Answer]:
    """Answers in stored order."""
    return sorted(answers, key=lambda answer: (answer.number, answer.turn))


def scores_of(config: Config, source: str, answers: Sequence[Answer]) -> Scores:
    """All answers of a source, scored together by its metric."""
    return load_metric(metric_of(config, source))([answer.said for answer in answers])


def answer_lines(
    config: Config, source: str, answers: Sequence[Answer], scores: Scores, pictured: int, decoding: Decoding
) -> list[dict[str, Any]]:
    """The lines of answers.jsonl of one source."""
    lines = []
    metric = metric_name(metric_of(config, source))
    for place, (answer, score) in enumerate(zip(answers, scores.samples, strict=True)):
        shown = place < pictured or score < 1
        lines.append(
            {
                "source": source,
                "key": answer.key,
                "turn": answer.turn,
                "question": answer.question,
                "answer": answer.answer,
                "references": list(answer.references),
                "metric": metric,
                "score": score,
                "decoding": decoding.stated(),
                "images": [data_uri(image) for image in answer.images] if shown else [],
            }
        )
    return lines
