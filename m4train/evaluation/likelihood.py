"""How likely given answers are: the options of multiple choice, and the references of perplexity.

All answers to one question are scored behind one reading of the prompt: its images pass the vision tower once, and its keys and
values are read from one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from m4train.models.decoding import DecodingSteps
from m4train.models.padded import as_tensor

AllRanks = Callable[[bool], bool]  # whether something holds on every rank


def all_ranks(engine: Any) -> AllRanks | None:
    """How ranks that share the weights keep together; None if each goes its own way."""
    return (lambda here: engine.agree([not here])[0] == 0) if engine.sharded else None


@torch.no_grad()
def answer_losses(
    model: Any, inputs: dict[str, Any], answers: Sequence[Sequence[list[int]]], together: AllRanks | None = None
) -> list[list[float]]:
    """For each prompt the summed loss, in nats, of each of its `answers` (token ids, at least one).

    Args:
        inputs: what the processor makes of the prompts, padded on the left, on the model's device.
        together: under engines whose ranks share the weights: all make as many passes as the longest answer of any needs.
    """
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longest = max((len(answer) for given in answers for answer in given), default=0)
    steps = DecodingSteps(model, ids, mask, images, max(longest, 1), all_ranks=together)
    logits = steps()
    rows = [row for row, given in enumerate(answers) for _ in given] or [0]
    flat = [answer for given in answers for answer in given] or [[0]]
    place = torch.tensor(rows, device=ids.device)
    steps.select(place)
    tokens, counted = _padded(flat, ids.device)
    losses = logits.new_zeros(len(flat))
    logits, step = logits[place], 0
    while True:
        here = step < tokens.shape[1]
        token = tokens[:, step] if here else tokens[:, 0]
        if here:
            losses += torch.where(
                counted[:, step], torch.nn.functional.cross_entropy(logits, token, reduction="none"), 0
            )
        done = step + 1 >= tokens.shape[1]
        if done if together is None else together(done):
            break
        logits, step = steps(token), step + 1
    found = iter(losses.tolist())
    return [[next(found) for _ in given] for given in answers]


def _padded(answers: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (N, L), and which of them belong to an answer."""
    length = max(len(answer) for answer in answers)
    ids = as_tensor("ids", [answer + [0] * (length - len(answer)) for answer in answers], device)
    there = as_tensor("there", [[True] * len(answer) + [False] * (length - len(answer)) for answer in answers], device)
    return ids, there
