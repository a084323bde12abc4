"""Few-shot prompts as Idefics was measured: answered samples of a support set before each question, drawn again for each.

The prompt is text, without turns: an instruction, `Image:<image>Question: ... Answer: ...` a line for each shot, then the question.
0 shots are two shots without their images, as Flamingo counted them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m4train.errors import ConfigError
from m4train.evaluation.benchmarks.records import Record, records
from m4train.evaluation.benchmarks.spec import Benchmark
from m4train.evaluation.generation import Asked

_ASK = "Instruction: provide an answer to the question. Use the image to answer.\n"
_OWN = {
    "vizwiz": "Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n",
}
# Renders the messages that `ShotMaker` makes: each is one line of the prompt, the last without its answer.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% for item in message.content %}{% if item.type == 'image' %}<image>{% else %}{{ item.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class ShotMaker:
    """Shots for the questions of one benchmark."""

    benchmark: Benchmark
    support: Sequence[tuple[Record, Path]]
    count: int  # of shots; 0: two without images
    ask: Any  # (record, folder, number) -> Asked, as questions are made
    similar: Callable[[int, int], list[int]] | None = None  # (number of a question, count) -> its shots; None: drawn

    @classmethod
    def of(cls, benchmark: Benchmark, place: Path, count: int, ask: Any, similar: Any = None) -> ShotMaker:
        """Raises ConfigError for a support set that is too small."""
        support = list(records(place))
        if len(support) < max(count, 2):
            raise ConfigError(f"{place} holds {len(support)} samples, but {max(count, 2)} shots are drawn from it.")
        return cls(benchmark, support, count, ask, similar)

    def before(self, asked: Asked, seed: int = 42) -> list[Asked]:
        """The shots for a question: the most similar ones, or drawn by its key, so that they do not depend on what is asked
        before."""
        draw = random.Random(f"{seed}/{self.benchmark.name}/{asked.key}/{asked.number}")
        numbers = draw.sample(range(len(self.support)), self.count) if self.count else [0, 1]
        if self.similar is not None and self.count:
            numbers = self.similar(asked.number, self.count)
        shots = [self.ask(*self.support[number], number) for number in numbers]
        return [replace(shot, images=[]) for shot in shots] if not self.count else shots

    def line(self, asked: Asked, answered: bool) -> list[dict[str, Any]]:
        """One line of the prompt, as the items of a message."""
        captions = self.benchmark.metric == "cider"
        images = [{"type": "image"} for _ in asked.images]
        start = [{"type": "text", "text": "Image:"}, *images] if images else []
        question = "Caption:" if captions else f"Question: {asked.about['question']} Answer:"
        said = f" {shown_answer(asked, captions)}\n" if answered else ""
        return [*start, {"type": "text", "text": question + said}]

    def prompt(self, shots: Sequence[Asked], asked: Asked) -> Asked:
        """The question behind its shots."""
        start = "" if self.benchmark.metric == "cider" else _OWN.get(self.benchmark.name, _ASK)
        lines = [[{"type": "text", "text": start}]] if start else []
        lines += [*(self.line(shot, True) for shot in shots), self.line(asked, False)]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [item for line in lines for item in line]}]
        images = [image for each in (*shots, asked) for image in each.images]
        about = {
            **asked.about,
            "shots": len(shots),
            "dropped_shots": max(self.count, 0 if self.count else 2) - len(shots),
        }
        return replace(asked, messages=[*messages, asked.messages[-1]], images=images, about=about, template=TEMPLATE)


def shown_answer(asked: Asked, captions: bool) -> str:
    """What a shot shows as its answer: the reference that most people gave; of captions one by the key of the sample."""
    if captions:
        return random.Random(asked.key).choice(asked.references)
    return Counter(asked.references).most_common(1)[0][0]


def fitting(maker: ShotMaker, asked: Asked, room: int, length: Any) -> Asked:
    """The question behind as many of its shots as `room` tokens hold: whole shots are dropped from the front."""
    shots = maker.before(asked)
    while True:
        prompt = maker.prompt(shots, asked)
        if not shots or length(prompt) <= room:
            return prompt
        shots = shots[1:]
