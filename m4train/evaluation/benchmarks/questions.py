"""A record of a benchmark as a question, with the prompt of the model's family."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from m4train.errors import DataError
from m4train.evaluation.benchmarks.records import Record, pictures
from m4train.evaluation.benchmarks.spec import Benchmark
from m4train.evaluation.generation import Asked
from m4train.evaluation.metrics.choices import LETTERS

_WRITTEN_OPTIONS = re.compile(r"\s*(?:Options|Choices)\s*:\s*", re.IGNORECASE)
_LETTERED = re.compile(r"(?:^|[,\n]\s*)\(?([A-H])[:.)]\s*(.*?)(?=[,\n]\s*\(?[A-H][:.)]\s|$)", re.DOTALL)
_PLACE = re.compile(r"<image (\d+)>")


def question(record: Record, folder: Path, benchmark: Benchmark, family: str, number: int) -> Asked:
    """What is asked of a record. Raises DataError for a record that lacks what the benchmark names."""
    key = str(_field(record, benchmark, "key", number))
    text, options = _options(record, benchmark, key)
    references = _references(record, benchmark, options)
    if not references and benchmark.submission is None:
        raise DataError(
            f"{benchmark.name}, sample {key}: it has no answer under {benchmark.columns.get('references')!r}."
        )
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options))
    images, names = _images(record, folder, benchmark, key)
    hint = str(_field(record, benchmark, "hint") or "")
    template = benchmark.prompt(family) if options or "{options}" not in benchmark.prompt(family) else _OPEN
    said = template.format(question=text, options=listed.rstrip("\n"), hint=f"{hint}\n" if hint else "")
    content = [{"image": str(place)} for place in range(len(images))]
    items: list[dict[str, Any]] = [*content, {"text": said}]
    if len(images) > 1 and names:
        items = [{"text": "Question: "}]
        for place in range(len(images)):
            items += [{"text": f"<image {names[place]}>:"}, {"image": str(place)}, {"text": "\n"}]
        items.append({"text": said.removeprefix("Question: ")})
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": [{"text": ""}]}]
    about = {name: record.get(name) for name in (*benchmark.about, *benchmark.groups)}
    about["question"] = text
    prefix = benchmark.prefix if options else ""
    return Asked(number, key, messages, images, references or ("",), 0, options, about, prefix)


_OPEN = "Question: {question}"


def _field(record: Record, benchmark: Benchmark, name: str, default: Any = None) -> Any:
    value = record.get(benchmark.columns.get(name, name))
    return default if value is None else value


def _options(record: Record, benchmark: Benchmark, key: str) -> tuple[str, tuple[str, ...]]:
    """The question, and the options that its record lists or writes into it."""
    text = _field(record, benchmark, "question", "")
    if not isinstance(text, str):
        raise DataError(f"{benchmark.name}, sample {key}: its question is a {type(text).__name__}, but must be a text.")
    options = _listed(_field(record, benchmark, "options"))
    if not options:
        options = [record[letter] for letter in LETTERS[:8] if record.get(letter) not in (None, "")]
    if not options and benchmark.columns.get("options") == "question":
        stem, *rest = _WRITTEN_OPTIONS.split(text, maxsplit=1)
        found = _LETTERED.findall(rest[0]) if rest else []
        text, options = (stem, [option.strip() for _, option in found]) if found else (text, [])
    return text.strip(), tuple(str(option) for option in options)


def _listed(value: Any) -> list[Any]:
    """A list, also one that is written as a text, as JSON or as Python writes it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                return list(read(value))
            except (ValueError, SyntaxError):
                continue
    return value if isinstance(value, list) else []


def _references(record: Record, benchmark: Benchmark, options: tuple[str, ...]) -> tuple[str, ...]:
    value = _field(record, benchmark, "references", record.get("references"))
    if options:
        value = value[0] if isinstance(value, list) and value else value  # of a canonical shard
        return (_letter(value, options),) if value is not None else ()
    found = _listed(value) or ([] if value is None else [value])
    texts = [
        each.get("answer", each.get("raw", each.get("caption"))) if isinstance(each, dict) else each for each in found
    ]
    return tuple(str(text) for text in texts if text is not None)


def _letter(value: Any, options: tuple[str, ...]) -> str:
    """The letter of the right option, which is given by letter, by number or by its text."""
    if isinstance(value, str) and value.strip("() ").upper() in LETTERS[: len(options)] and value.strip("() "):
        return value.strip("() ").upper()
    if str(value) in options:
        return LETTERS[options.index(str(value))]
    place = int(value) if str(value).isdigit() else -1
    return LETTERS[place] if 0 <= place < len(options) else str(value)


def _images(record: Record, folder: Path, benchmark: Benchmark, key: str) -> tuple[list[Any], list[int]]:
    """The images of a record; of those in numbered columns that the question or the options name, also their numbers."""
    column = benchmark.columns.get("image", "image")
    if "{}" not in column:
        return pictures(record.get(column), folder, key), []
    named = " ".join(str(record.get(benchmark.columns.get(name, name), "")) for name in ("question", "options"))
    numbers = sorted({int(each) for each in _PLACE.findall(named)}) or [1]
    found = [(number, pictures(record.get(column.format(number)), folder, key)) for number in numbers]
    return [image for _, images in found for image in images], [number for number, images in found for _ in images]
