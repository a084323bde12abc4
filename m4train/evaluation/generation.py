"""Answers generated for held-out conversations, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image

from m4train.errors import DataError
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.metrics import Metric
from m4train.models.generation_settings import GenerationSettings

AllRanks = Callable[[bool], bool]  # whether something holds on every rank


@dataclass(frozen=True)
class Asked:
    """One held-out conversation; `references` are the answers that count as right, instead of its last message."""

    number: int  # in its source
    key: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said to the last question of one held-out conversation, and its score from 0 to 1."""

    number: int
    key: str
    question: str
    answer: str
    references: tuple[str, ...]
    score: float
    images: list[Image.Image]


# Asked together with others under engines whose ranks share the weights, and dropped: it gives every rank an image to see and a
# row to continue, whatever its own samples are.
_FILLER = Asked(
    -1, "filler", [{"role": "user", "content": [{"image": "0"}, {"text": "?"}]}], [Image.new("RGB", (8, 8))]
)


def answer_conversations(
    model: Any,
    processor: Any,
    conversations: Iterable[Asked],
    decoding: Decoding,
    metric: Metric,
    device: torch.device,
    all_ranks: AllRanks | None = None,
    *,
    batch_size: int,
    seed: int = 0,
) -> Iterator[Answer]:
    """Answers to the last question of each conversation, in order, `batch_size` of them made together.

    The prompt is all before the last assistant turn. With `all_ranks`, every rank makes the same number of forward passes,
    each with images, until all have answered: for models whose weights are spread over several ranks. Raises DataError for a
    conversation whose last turn is not the assistant's.
    """
    iterator = iter(conversations)
    while True:
        batch = list(islice(iterator, batch_size))
        done = not batch if all_ranks is None else all_ranks(not batch)
        if done:
            return
        prompts = batch if all_ranks is None else [*batch, _FILLER]
        generator = decoding.generator(seed, prompts[0].number, device)
        settings = decoding.settings(generator=generator, all_ended=all_ranks)
        texts = _generate(model, processor, prompts, settings, device)
        for asked, text in zip(batch, texts, strict=False):  # without the filler's
            references = asked.references or (_text(asked.messages[-1]).strip(),)
            question, said = _text(asked.messages[-2]), text.strip()
            yield Answer(asked.number, asked.key, question, said, references, metric(said, references), asked.images)


@torch.no_grad()
def _generate(
    model: Any,
    processor: Any,
    batch: Sequence[Asked],
    settings: GenerationSettings,
    device: torch.device,
) -> list[str]:
    inputs = processor.apply_chat_template(
        [asked.messages if asked is _FILLER else _prompt(asked) for asked in batch],
        images=[asked.images for asked in batch],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    generated = model.generate(**inputs, generation_config=settings)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _prompt(asked: Asked) -> list[dict[str, Any]]:
    if len(asked.messages) < 2 or asked.messages[-1]["role"] != "assistant":
        raise DataError(f"sample {asked.key}: evaluation needs conversations that end with the assistant's answer.")
    return asked.messages[:-1]


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(item["text"] for item in content if item.get("text"))
