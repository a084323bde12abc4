"""Answers generated for held-out conversations, and the losses of those that were expected."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from m4train.errors import DataError
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.likelihood import AllRanks, answer_losses
from m4train.evaluation.metrics.choices import LETTERS
from m4train.evaluation.metrics.said import Said
from m4train.models.generation_settings import GenerationSettings


@dataclass(frozen=True)
class Asked:
    """One held-out conversation; `references` are the answers that count as right, instead of its last message."""

    number: int  # in its source
    key: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    references: tuple[str, ...] = ()
    turn: int = 0  # of several questions of one conversation
    options: tuple[str, ...] = ()  # of multiple choice
    about: Mapping[str, Any] = field(default_factory=dict)  # further fields of the record
    prefix: str = ""  # how the answer begins; it is part of the prompt
    template: str | None = None  # the chat template that writes the prompt; None: the model's own

    @cached_property
    def pictured(self) -> str:
        """The same for what is about the same images."""
        digest = hashlib.blake2b(digest_size=16)
        for image in self.images:
            digest.update(f"{image.mode}{image.size}".encode())
            digest.update(image.tobytes())
        return digest.hexdigest() if self.images else ""


@dataclass(frozen=True)
class Answer:
    """What the model said to one question of a held-out conversation."""

    number: int  # of the conversation in its source
    key: str
    question: str
    answer: str
    references: tuple[str, ...]
    images: list[Image.Image]
    turn: int = 0  # of the question in the conversation
    options: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> Said:
        """What a metric is given of it."""
        return Said(self.answer, self.references, self.question, self.key, self.options, self.about)


# Asked together with others under engines whose ranks share the weights, and dropped: it gives every rank an image to see and a
# row to continue, whatever its own samples are.
_FILLER = Asked(
    -1,
    "filler",
    [{"role": "user", "content": [{"image": "0"}, {"text": "?"}]}, {"role": "assistant", "content": "!"}],
    [Image.new("RGB", (8, 8))],
)


def answer_conversations(
    model: Any,
    processor: Any,
    conversations: Iterable[Asked],
    decoding: Decoding,
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
    for batch, prompts in _batches(conversations, batch_size, all_ranks):
        generator = decoding.generator(seed, prompts[0].number, device)
        settings = decoding.settings(generator=generator, all_ended=all_ranks)
        texts = _generate(model, processor, prompts, settings, device)
        for asked, text in zip(batch, texts, strict=False):  # without the filler's
            yield _answer(asked, text.strip())


def reference_losses(
    model: Any,
    processor: Any,
    conversations: Iterable[Asked],
    device: torch.device,
    all_ranks: AllRanks | None = None,
    *,
    batch_size: int,
) -> Iterator[Answer]:
    """The loss of the first reference of each question, as `loss` and `tokens` in what the answer is about.

    Of a reference count its own tokens, not the end of the turn.
    """
    for batch, prompts in _batches(conversations, batch_size, all_ranks):
        ids = [answer_ids(processor, asked, _references(asked)[0]) for asked in prompts]
        losses = answer_losses(model, inputs_of(processor, prompts, device), [[each] for each in ids], all_ranks)
        for asked, each, (loss,) in zip(batch, ids, losses, strict=False):
            yield _answer(asked, "", {"loss": loss, "tokens": len(each)})


def likeliest_options(
    model: Any,
    processor: Any,
    conversations: Iterable[Asked],
    device: torch.device,
    all_ranks: AllRanks | None = None,
    *,
    batch_size: int,
) -> Iterator[Answer]:
    """Answers of multiple choice by likelihood: the letter with the highest sum of log-probabilities; nothing is drawn or
    parsed. The losses of all letters are kept as `losses` in what the answer is about."""
    for batch, prompts in _batches(conversations, batch_size, all_ranks):
        ids = [[answer_ids(processor, asked, letter) for letter in LETTERS[: len(asked.options)]] for asked in prompts]
        for asked, losses in zip(
            batch, answer_losses(model, inputs_of(processor, prompts, device), ids, all_ranks), strict=False
        ):
            yield _answer(asked, LETTERS[losses.index(min(losses))], {"losses": losses})


def answer_ids(processor: Any, asked: Asked, text: str) -> list[int]:
    """The ids of a text as the answer to a question, with what the chat template writes before it, but not behind it."""
    start = f"{asked.prefix} {text}" if asked.prefix else text
    answered = [*asked.messages[:-1], {"role": "assistant", "content": [{"text": start}]}]
    prompt, whole = (
        processor.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
        for messages, asks in ((asked.messages[:-1], True), (answered, False))
    )
    if asked.prefix and whole.startswith(prompt):
        prompt = whole[: whole.find(asked.prefix, len(prompt)) + len(asked.prefix)]
    end = whole.find(text, len(prompt)) + len(text) if whole.startswith(prompt) else -1
    if end < len(prompt):
        raise DataError(f"sample {asked.key}: the chat template does not write the answer {text!r} behind its prompt.")
    before, ids = (processor.tokenizer(given, add_special_tokens=False)["input_ids"] for given in (prompt, whole[:end]))
    if ids[: len(before)] != before:  # the tokenizer joins both sides of the border
        return processor.tokenizer(whole[len(prompt) : end], add_special_tokens=False)["input_ids"]
    return ids[len(before) :]


def _batches(
    conversations: Iterable[Asked], size: int, all_ranks: AllRanks | None
) -> Iterator[tuple[list[Asked], list[Asked]]]:
    """(what is asked, that with a filler under `all_ranks`), until all ranks are through."""
    batches = _cut(conversations, size)
    while True:
        batch = next(batches, [])
        done = not batch if all_ranks is None else all_ranks(not batch)
        if done:
            return
        yield batch, batch if all_ranks is None else [*batch, _FILLER]


def _cut(conversations: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    """Batches of at most `size`; neighbours about the same images, which are then read once, stay together if they fit."""
    batch: list[Asked] = []
    for _, group in groupby(conversations, key=lambda asked: (asked.pictured, asked.number if not asked.images else 0)):
        together = list(group)
        if batch and len(batch) + len(together) > size:
            yield batch
            batch = []
        batch += together
        while len(batch) >= size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def _answer(asked: Asked, text: str, about: Mapping[str, Any] | None = None) -> Answer:
    about = {**asked.about, **(about or {})}
    question, references = _text(asked.messages[-2]), _references(asked)
    found = (asked.number, asked.key, question, text, references, asked.images, asked.turn, asked.options, about)
    return Answer(*found)


def _references(asked: Asked) -> tuple[str, ...]:
    return asked.references or (_text(asked.messages[-1]).strip(),)


def every_question(asked: Asked) -> list[Asked]:
    """A conversation of several turns as one question for each answer of the assistant, with the answers before as they stand.

    Turns of weight 0 are context and are not asked. `references` are of the last question.
    """
    messages = asked.messages
    found: list[Asked] = []
    for place, message in enumerate(messages[:-1]):
        if message["role"] == "assistant" and place and message.get("weight", 1.0):
            images = asked.images[: sum(_images(before) for before in messages[:place])]
            found.append(replace(asked, messages=messages[: place + 1], images=images, references=(), turn=len(found)))
    return [*found, replace(asked, turn=len(found))]


def _images(message: dict[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum("image" in item for item in content)


@torch.no_grad()
def _generate(
    model: Any,
    processor: Any,
    batch: Sequence[Asked],
    settings: GenerationSettings,
    device: torch.device,
) -> list[str]:
    inputs = inputs_of(processor, batch, device)
    generated = model.generate(**inputs, generation_config=settings)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def prompts(processor: Any, conversations: list[Any], images: list[Any], variables: Mapping[str, Any]) -> Any:
    """What the model takes to answer the last message of each conversation, padded on the left; `variables` are the
    chat template's. Raises ValueError for what the template refuses."""
    return processor.apply_chat_template(
        conversations,
        images=images,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        **variables,
    )


def inputs_of(processor: Any, batch: Sequence[Asked], device: torch.device) -> dict[str, Any]:
    """The prompts of a batch, padded on the left."""
    template = {"chat_template": batch[0].template} if batch[0].template else {}
    inputs = prompts(processor, [_prompt(asked) for asked in batch], [asked.images for asked in batch], template)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    prefixes = {asked.prefix for asked in batch if asked is not _FILLER} or {""}
    if len(prefixes) > 1:
        raise ValueError(f"answers of one batch begin with {sorted(prefixes)}: ask those that begin alike together")
    if prefix := prefixes.pop():
        _append(inputs, answer_ids(processor, replace(batch[0], prefix=""), prefix))
    return inputs


def _append(inputs: dict[str, Any], ids: list[int]) -> None:
    """Goes on with `ids` in every row; they see the images that the last token of a prompt sees."""
    rows = len(inputs["input_ids"])
    more = {"input_ids": inputs["input_ids"].new_tensor(ids).expand(rows, -1)}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    if "image_attention_mask" in inputs:
        more["image_attention_mask"] = inputs["image_attention_mask"][:, -1:].expand(-1, len(ids), -1)
    for name, columns in more.items():
        inputs[name] = torch.cat((inputs[name], columns.to(inputs[name].dtype)), dim=1)


def _prompt(asked: Asked) -> list[dict[str, Any]]:
    if len(asked.messages) < 2 or asked.messages[-1]["role"] != "assistant":
        raise DataError(f"sample {asked.key}: evaluation needs conversations that end with the assistant's answer.")
    return asked.messages[:-1]


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(item["text"] for item in content if item.get("text"))
