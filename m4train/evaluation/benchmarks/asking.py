"""Which samples of a benchmark each process asks about, in which order, and the lines of their answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from m4train.evaluation.benchmarks.questions import question
from m4train.evaluation.benchmarks.records import count_records, place_of, records
from m4train.evaluation.benchmarks.shots import ShotMaker, fitting
from m4train.evaluation.benchmarks.similar import similar_shots
from m4train.evaluation.benchmarks.spec import Benchmark
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.generation import Answer, Asked, answer_conversations, inputs_of, likeliest_options
from m4train.evaluation.likelihood import all_ranks
from m4train.training.engines.base import Engine
from m4train.training.heartbeat import Heartbeat

_WINDOW = 16  # batches that are sorted by length together
Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A model that benchmarks are run on, placed by its engine, and how."""

    model: Any
    processor: Any
    name: str  # of the model, in results
    decoding: Decoding
    engine: Engine
    batch_size: int
    limit: int | None = None  # samples, chosen by the hash of their keys; None: all
    shots: int | None = None  # answered samples before each question; None: the question alone
    support: Path | None = None  # where shots are drawn from: a folder with a folder or file for each benchmark
    rices: Path | None = None  # folder of the embeddings by which the most similar shots are chosen; None: drawn
    heart: Heartbeat | None = None

    @property
    def family(self) -> str:
        return self.model.config.model_type


def prompt_name(benchmark: Benchmark, setting: Setting) -> str:
    """Names what is asked and how, shots included."""
    shots = "" if setting.shots is None else f"-{setting.shots}shots{'-rices' if setting.rices else ''}"
    return benchmark.prompt_hash(setting.family) + shots


def chosen_numbers(benchmark: Benchmark, place: Path, setting: Setting) -> set[int]:
    """The numbers of all samples; or of a subset, those whose keys have the lowest hashes, whatever stands next to them. Samples of one
    key, as MME's two questions of a picture, are taken together."""
    if setting.limit is None:
        return set(range(count_records(place)))
    ask = partial(_question, benchmark, setting.family)
    keys = [ask(record, folder, number).key for number, (record, folder) in enumerate(records(place))]
    hashed = sorted((hashlib.blake2b(key.encode()).digest(), number) for number, key in enumerate(keys))
    taken = {place for place, _ in hashed[: setting.limit]}
    return {number for place, number in hashed if place in taken}


def share(numbers: Iterable[int], rank: int, world_size: int) -> set[int]:
    """What a rank asks of these samples: neighbours, which are often about the same image."""
    ordered = sorted(numbers)
    return set(ordered[rank * len(ordered) // world_size : (rank + 1) * len(ordered) // world_size])


def to_ask(benchmark: Benchmark, place: Path, setting: Setting, numbers: set[int]) -> Iterator[Asked]:
    """The questions of the samples `numbers`, in stored order. All ranks call it."""
    ask = partial(_question, benchmark, setting.family)
    shots = None
    if setting.shots is not None:
        assert setting.support is not None
        support, chosen = place_of(setting.support, benchmark.name), None
        if setting.rices is not None:
            chosen = similar_shots(benchmark.name, place, support, setting, ask)
        shots = ShotMaker.of(benchmark, support, setting.shots, ask, chosen)
    return _asked(place, ask, numbers, shots, benchmark, setting)


def _asked(
    place: Path, ask: Any, numbers: set[int], shots: ShotMaker | None, benchmark: Benchmark, setting: Setting
) -> Iterator[Asked]:
    length = partial(_tokens, setting)
    for number, (record, folder) in enumerate(records(place)):
        if number in numbers:
            if setting.heart is not None:
                setting.heart.beat("benchmarks")
            asked = ask(record, folder, number)
            yield asked if shots is None else fitting(shots, asked, _room(setting, benchmark), length)


def _question(benchmark: Benchmark, family: str, record: Any, folder: Path, number: int) -> Asked:
    return question(record, folder, benchmark, family, number)


def _room(setting: Setting, benchmark: Benchmark) -> int:
    """Tokens that a prompt may have."""
    return setting.model.config.text_config.max_position_embeddings - benchmark.max_new_tokens


def _tokens(setting: Setting, asked: Asked) -> int:
    """The length of a prompt in tokens, images expanded."""
    return inputs_of(setting.processor, [asked], torch.device("cpu"))["input_ids"].shape[1]


def answered(benchmark: Benchmark, setting: Setting, asked: Iterator[Asked]) -> Iterator[Line]:
    """The lines of answers as they are made. All ranks call it: if they share the weights, they make the same passes."""
    return (_line(benchmark, answer) for answer in _answers(benchmark, setting, asked))


def _answers(benchmark: Benchmark, setting: Setting, asked: Iterator[Asked]) -> Iterator[Answer]:
    """Answers made together for questions of about the same length that begin alike."""
    processor = sized(setting.processor, benchmark.tiles)
    decoding = replace(setting.decoding, max_new_tokens=benchmark.max_new_tokens)
    together = all_ranks(setting.engine)
    place = (setting.engine.device, together)
    while True:
        window = list(islice(asked, _WINDOW * setting.batch_size))
        if not window if together is None else together(not window):
            return
        window.sort(key=_length)
        for with_options in (False, True):  # the same two rounds on every rank
            round_ = [each for each in window if bool(each.options) == with_options]
            given = (setting.model, processor, round_)
            if with_options and benchmark.scoring == "likelihood":
                yield from likeliest_options(*given, *place, batch_size=setting.batch_size)
            else:
                yield from answer_conversations(*given, decoding, *place, batch_size=setting.batch_size)


def _length(asked: Asked) -> tuple[int, str, int]:
    """What the length of a prompt follows: its images, then its text; those about the same images stand together."""
    area = sum(image.width * image.height for image in asked.images)
    return area, asked.pictured, sum(len(item.get("text", "")) for item in asked.messages[0]["content"])


def sized(processor: Any, tiles: int | None) -> Any:
    """The processor with images whose longest side is so many tiles, for those that cut images into tiles."""
    side = getattr(processor.image_processor, "max_image_size", None)
    if (
        tiles is None
        or not isinstance(side, dict)
        or not getattr(processor.image_processor, "do_image_splitting", False)
    ):
        return processor
    changed = copy.copy(processor)
    changed.image_processor = processor.image_processor.replace(size={"longest_edge": tiles * side["longest_edge"]})
    return changed


def _line(benchmark: Benchmark, answer: Answer) -> Line:
    text = answer.answer
    places = [place for word in benchmark.stop_words if (place := text.find(word)) >= 0]
    about = {name: value for name, value in answer.about.items() if isinstance(value, (str, int, float, list))}
    return {
        "benchmark": benchmark.name,
        "number": answer.number,
        "key": answer.key,
        "question": answer.question,
        "answer": text[: min(places, default=len(text))].strip(),
        "references": list(answer.references),
        "options": list(answer.options),
        "about": about,
    }
