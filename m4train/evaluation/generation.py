"""Answers generated for held-out conversations, and their score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image

from m4train.config import EvaluationConfig
from m4train.errors import DataError
from m4train.evaluation.metrics import exact_match

Conversation = tuple[str, list[dict[str, Any]], list[Image.Image]]  # key, messages, images


@dataclass(frozen=True)
class Answer:
    """What the model said to the last question of one held-out conversation."""

    key: str
    question: str
    answer: str
    reference: str
    images: list[Image.Image]

    @property
    def correct(self) -> bool:
        return exact_match(self.answer, self.reference) == 1.0


@torch.inference_mode()
def answer_conversations(
    model: Any, processor: Any, conversations: Iterable[Conversation], config: EvaluationConfig
) -> Iterator[Answer]:
    """Greedy answers to the last question of each conversation, in order.

    The prompt is all before the last assistant turn. Raises DataError for a conversation whose last turn is not the
    assistant's.
    """
    iterator = iter(conversations if config.max_samples is None else islice(conversations, config.max_samples))
    device = next(model.parameters()).device
    while batch := list(islice(iterator, config.batch_size)):
        inputs = processor.apply_chat_template(
            [_question(conversation) for conversation in batch],
            images=[images for _, _, images in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        stop = [processor.end_of_utterance_id, processor.eos_id]
        generated = model.generate(
            **inputs, max_new_tokens=config.max_new_tokens, eos_token_id=stop, pad_token_id=processor.pad_id
        )
        texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (key, messages, images), text in zip(batch, texts):
            yield Answer(key, _text(messages[-2]), text.strip(), _text(messages[-1]).strip(), images)


def _question(conversation: Conversation) -> list[dict[str, Any]]:
    key, messages, _ = conversation
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"sample {key}: evaluation needs conversations that end with the assistant's answer.")
    return messages[:-1]


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(item["text"] for item in content if item.get("text"))


def score(answers: list[Answer]) -> dict[str, float | int]:
    """`exact_match` from 0 to 1 over `count` answers."""
    count = len(answers)
    return {"exact_match": round(sum(answer.correct for answer in answers) / max(count, 1), 4), "count": count}
