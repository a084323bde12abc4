"""A benchmark from its records to its score: what is asked, what is stored a sample, and the files of test servers."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from m4train.evaluation.benchmarks.questions import question
from m4train.evaluation.benchmarks.records import place_of, records
from m4train.evaluation.benchmarks.shots import ShotMaker, fitting
from m4train.evaluation.benchmarks.spec import Benchmark
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.generation import Answer, Asked, answer_conversations, inputs_of, likeliest_options
from m4train.evaluation.metrics.registry import OF_WHOLE_SETS, load_metric
from m4train.evaluation.metrics.said import Said, Scores
from m4train.json_lines import keep_lines

_WINDOW = 16  # batches that are sorted by length together
Line = dict[str, Any]
Read = Callable[[], Iterator[Asked]]


@dataclass(frozen=True)
class Setting:
    """A model that benchmarks are run on, and how."""

    model: Any
    processor: Any
    family: str
    name: str  # of the model, in results
    decoding: Decoding
    device: torch.device
    batch_size: int
    limit: int | None = None  # samples, chosen by the hash of their keys; None: all
    shots: int | None = None  # answered samples before each question; None: the question alone
    support: Path | None = None  # where shots are drawn from: a folder with a folder or file for each benchmark


@dataclass(frozen=True)
class Result:
    """The scores of one benchmark, with those of its groups: column/value -> mean."""

    benchmark: Benchmark
    lines: list[Line]
    scores: Scores | None  # None: no sample has an answer, as in the splits of test servers
    prompt: str  # its hash
    groups: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def run_benchmark(benchmark: Benchmark, place: Path, setting: Setting, out: Path) -> Result:
    """Asks what `out`/NAME.jsonl does not hold yet of this model and prompt, and scores all of it.

    Lines are appended as answers are made: a run that is killed goes on.
    """
    prompt = benchmark.prompt_hash(setting.family) + ("" if setting.shots is None else f"-{setting.shots}shots")
    path = out / f"{benchmark.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    of_this = {"model": setting.name, "prompt": prompt}
    lines = [line for line in keep_lines(path, needs=("number",)) if line.items() >= of_this.items()]
    chosen = chosen_numbers(benchmark, place, setting)
    done = {line["number"] for line in lines}
    asked = to_ask(benchmark, place, setting, chosen, done)
    _replace(path, lines)
    with path.open("a", encoding="utf-8") as file:
        for answer in answered(benchmark, setting, asked):
            line = of_this | answer
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
    lines = sorted(
        (line for line in lines if chosen is None or line["number"] in chosen), key=lambda line: line["number"]
    )
    result = scored(benchmark, lines, prompt)
    _replace(path, result.lines)
    return result


def scored(benchmark: Benchmark, lines: Sequence[Line], prompt: str) -> Result:
    """The lines with their scores, and what is reported of them."""
    known = [line for line in lines if line["references"] != [""]]
    if not known:
        return Result(benchmark, list(lines), None, prompt, remarks=("no sample has an answer",))
    scores = load_metric(benchmark.metric)([_said(line) for line in known])
    lines = [line | {"score": score} for line, score in zip(known, scores.samples, strict=True)]
    groups: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for column in benchmark.groups:
            groups[f"{column}/{line['about'].get(column)}"].append(line["score"])
    means = {name: sum(values) / len(values) for name, values in sorted(groups.items())}
    remarks = []
    if len(lines) != benchmark.expected:
        remarks.append(f"{len(lines)} of {benchmark.expected} samples")
        if benchmark.metric in OF_WHOLE_SETS:
            remarks.append("its score depends on the whole set: not comparable with published ones")
    return Result(benchmark, lines, scores, prompt, means, tuple(remarks))


def submission(result: Result) -> list[dict[str, Any]] | None:
    """What the server of the test split takes: [{id, answer}]; None for a benchmark without one."""
    name = result.benchmark.submission
    if name is None:
        return None
    keys = ((int(line["key"]) if line["key"].isdigit() else line["key"], line["answer"]) for line in result.lines)
    return [{name: key, "answer": answer} for key, answer in keys]


def chosen_numbers(benchmark: Benchmark, place: Path, setting: Setting) -> set[int] | None:
    """The numbers of the samples of a subset: those whose keys have the lowest hashes, whatever stands next to them."""
    if setting.limit is None:
        return None
    column = benchmark.columns.get("key", "key")
    keyed = ((number, str(record.get(column, number))) for number, (record, _) in enumerate(records(place)))
    hashed = ((hashlib.blake2b(f"{key}/{number}".encode()).digest(), number) for number, key in keyed)
    return {number for _, number in sorted(hashed)[: setting.limit]}


def to_ask(
    benchmark: Benchmark, place: Path, setting: Setting, chosen: set[int] | None, done: set[int]
) -> Iterator[Asked]:
    ask = partial(_question, benchmark, setting.family)
    shots = None
    if setting.shots is not None:
        assert setting.support is not None
        shots = ShotMaker.of(benchmark, place_of(setting.support, benchmark.name), setting.shots, ask)
    for number, (record, folder) in enumerate(records(place)):
        if number not in done and (chosen is None or number in chosen):
            asked = ask(record, folder, number)
            yield (
                asked if shots is None else fitting(shots, asked, _room(setting, benchmark), partial(_tokens, setting))
            )


def _question(benchmark: Benchmark, family: str, record: Any, folder: Path, number: int) -> Asked:
    return question(record, folder, benchmark, family, number)


def _room(setting: Setting, benchmark: Benchmark) -> int:
    """Tokens that a prompt may have."""
    return setting.model.config.text_config.max_position_embeddings - benchmark.max_new_tokens


def _tokens(setting: Setting, asked: Asked) -> int:
    """The length of a prompt in tokens, images expanded."""
    return inputs_of(setting.processor, [asked], torch.device("cpu"))["input_ids"].shape[1]


def answered(benchmark: Benchmark, setting: Setting, asked: Iterator[Asked]) -> Iterator[Line]:
    """The lines of answers as they are made."""
    return (_line(benchmark, answer) for answer in _answers(benchmark, setting, asked))


def _answers(benchmark: Benchmark, setting: Setting, asked: Iterator[Asked]) -> Iterator[Answer]:
    """Answers made together for questions of about the same length that begin alike."""
    processor = sized(setting.processor, benchmark.tiles)
    size = setting.batch_size
    decoding = replace(setting.decoding, max_new_tokens=benchmark.max_new_tokens)
    while window := list(islice(asked, _WINDOW * size)):
        by_options = benchmark.scoring == "likelihood"
        kinds: dict[tuple[str, bool], list[Asked]] = defaultdict(list)
        for each in sorted(window, key=_length):
            kinds[each.prefix, by_options and bool(each.options)].append(each)
        for (_, likely), together in kinds.items():
            place = (setting.model, processor, together)
            if likely:
                yield from likeliest_options(*place, setting.device, batch_size=size)
            else:
                yield from answer_conversations(*place, decoding, setting.device, batch_size=size)


def _length(asked: Asked) -> tuple[int, int]:
    """What the length of a prompt follows: its images, then its text."""
    area = sum(image.width * image.height for image in asked.images)
    return area, sum(len(item.get("text", "")) for item in asked.messages[0]["content"])


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


def _said(line: Line) -> Said:
    place = (tuple(line["references"]), line["question"], line["key"], tuple(line["options"]), line["about"])
    return Said(line["answer"], *place)


def _replace(path: Path, lines: Sequence[Line]) -> None:
    aside = path.with_name(f"{path.name}.writing")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)
