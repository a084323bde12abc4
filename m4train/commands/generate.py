"""`m4train generate MODEL [QUESTION] [IMAGE ...]`: answers of a model, to one question, to a file of them, or in a chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from m4train.errors import BadSample, ConfigError, DataError


@dataclass
class Question:
    """What is asked: messages whose images are `images`, in order; variables of the chat template; and its record."""

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def generate(**values: Any) -> int:
    """Prints or writes the answers; `values` are those of its options (cli.py). Raises ConfigError for one that is missing or wrong."""
    given = SimpleNamespace(**values)
    if sum((given.question is not None, given.questions is not None, given.chat)) != 1:
        raise ConfigError(
            "generate needs one of QUESTION, --questions FILE and --chat: m4train generate MODEL QUESTION [IMAGE ...]."
        )
    if given.answers is not None and given.questions is None:
        raise ConfigError("--answers is where the lines of --questions go: give --questions too.")
    if not given.sample and (given.temperature, given.top_p, given.top_k) != (None, None, None):
        raise ConfigError("--temperature, --top-p and --top-k say how to draw: give --sample too.")
    questions = _of_file(Path(given.questions), given.system) if given.questions else []
    if given.question is not None:
        questions = [_asked(given.question, given.images, given.system)]
    from m4train.terminal import narrated, stage

    with narrated():
        stage("importing torch and what the command needs")
        from m4train.commands.answerer import Answerer

        stage(f"reading the model {given.model}")
        answerer = Answerer.of(given)
    if given.chat:
        return _chat(answerer, given)
    if given.questions is None:
        _one(answerer, questions[0], given)
        return 0
    lines = _answered(answerer, questions, given.batch_size)
    if given.answers is None:
        for line in lines:
            print(line, flush=True)
        return 0
    target = Path(given.answers)
    try:
        with target.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
    except OSError as error:
        raise ConfigError(f"--answers {target} cannot be written ({error.strerror}).") from error
    print(f"{len(questions)} answers in {target}")
    return 0


def _asked(text: str, images: list[str], system: str | None) -> Question:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Question([*_said_first(system), {"role": "user", "content": content}], [_image(path) for path in images])


def _said_first(system: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []


def _image(path: Any, folder: Path | None = None) -> Any:
    """A picture, read. Raises ConfigError for what is none."""
    from m4train.processing.inputs import read_image

    place = str(folder / path) if folder is not None and isinstance(path, str) and "://" not in path else path
    try:
        return read_image(place)
    except Exception as error:  # of Pillow, of the network, of the file system
        raise ConfigError(
            f"{str(path)[:200]} is not a picture that can be read ({type(error).__name__}: {error})."
        ) from error


def _of_file(path: Path, system: str | None) -> list[Question]:
    """The questions of a file of JSON lines. Raises ConfigError naming the line that holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--questions {path} cannot be read as text ({error}).") from error
    return [
        _of_line(line, f"{path}, line {number}", path.parent, system)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _of_line(line: str, place: str, folder: Path, system: str | None) -> Question:
    from m4train.processing.calls import images_of

    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("question", record.get("messages")), (str, list)):
        raise ConfigError(f"{place} holds no `question` (a text) and no `messages` (a list).")
    images = record.get("images", record.get("image", []))
    images = images if isinstance(images, list) else [images]
    variables = {name: record[name] for name in ("tools", "documents") if name in record}
    if isinstance(record.get("question"), str):
        asked = _asked(record["question"], [], record.get("system", system))
        asked.messages[-1]["content"] = [*({"type": "image"} for _ in images), *asked.messages[-1]["content"]]
    else:
        asked = Question([*_said_first(system), *record["messages"]])
        try:
            images = images or images_of(asked.messages)
        except (BadSample, AttributeError) as error:
            raise ConfigError(f"{place}: {error}") from error
    return Question(asked.messages, [_image(image, folder) for image in images], variables, record)


def _answered(answerer: Any, questions: list[Question], size: int) -> Iterator[str]:
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        for question, answer in zip(batch, answerer.answers(batch, start), strict=True):
            yield json.dumps({**question.record, "answer": answer}, ensure_ascii=False)


def _one(answerer: Any, question: Question, given: SimpleNamespace, number: int = 0) -> str:
    """The answer to one question, printed piece by piece while it is made, unless that is not wanted."""
    stream = not given.no_stream and given.beams == 1
    pieces = (lambda text: print(text, end="", flush=True)) if stream else None
    answer = answerer.answers([question], number, pieces)[0]
    print("" if stream else answer)
    return answer


def _chat(answerer: Any, given: SimpleNamespace) -> int:
    """Turns at the terminal, until /quit or the end of the input."""
    question, waiting = Question(_said_first(given.system)), []
    for turn in range(sys.maxsize):
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if text == "/quit":
            break
        if text.startswith("/image "):
            try:
                waiting.append(_image(text.removeprefix("/image ").strip()))
            except ConfigError as error:
                print(error)
            continue
        if not text:
            continue
        content = [*({"type": "image"} for _ in waiting), {"type": "text", "text": text}]
        question.messages.append({"role": "user", "content": content})
        question.images, waiting = [*question.images, *waiting], []
        try:
            answer = _one(answerer, question, given, turn)
        except (BadSample, DataError) as error:
            print(error)
            question.messages.pop()
            continue
        question.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return 0


def decoding_of(given: SimpleNamespace) -> dict[str, Any]:
    """The keys of evaluation.decoding that the arguments set."""
    from m4train.config import DecodingConfig

    own = {"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k, "do_sample": given.sample}
    own |= {"num_beams": given.beams, "repetition_penalty": given.repetition_penalty}
    return asdict(DecodingConfig()) | {name: value for name, value in own.items() if value is not None}
