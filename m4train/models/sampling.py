"""From logits to the next token: what must not follow, temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m4train.errors import DataError

if TYPE_CHECKING:
    from m4train.models.generation_settings import GenerationSettings


def constrain(scores: Tensor, sequences: Tensor, settings: GenerationSettings, real: Tensor) -> Tensor:
    """Scores (B, V) of what may follow `sequences` (B, T), -inf where nothing may; `real` (B, prompt) bool is False at padding.

    Raises:
        DataError: impossible bad words.
    """
    prompt = real.shape[1]
    if settings.repetition_penalty != 1.0:
        scores = _penalised(scores, sequences, settings.repetition_penalty, real)
    if 0 < settings.no_repeat_ngram_size <= sequences.shape[1]:
        scores = _without_repeats(scores, sequences, settings.no_repeat_ngram_size)
    if sequences.shape[1] - prompt < settings.fewest_new(prompt):
        ends = torch.isin(torch.arange(scores.shape[1]), torch.tensor(settings.ends, dtype=torch.int64))
        scores = scores.masked_fill(ends.to(scores.device), -torch.inf)
    return _forbid(scores, sequences, settings.bad_words_ids, settings.ends)


def _penalised(scores: Tensor, sequences: Tensor, penalty: float, real: Tensor) -> Tensor:
    """Scores of the ids that a row holds, its prompt included, made less by `penalty`."""
    vocab, prompt = scores.shape[1], real.shape[1]
    ids = torch.cat((sequences[:, :prompt].masked_fill(~real, vocab), sequences[:, prompt:]), dim=1)
    held = torch.zeros(scores.shape[0], vocab + 1, dtype=torch.bool, device=scores.device).scatter(1, ids, True)
    return torch.where(held[:, :vocab], torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _without_repeats(scores: Tensor, sequences: Tensor, size: int) -> Tensor:
    """-inf for each token that would complete a sequence of `size` ids that its row holds already."""
    grams = sequences.unfold(1, size, 1)  # (B, T - size + 1, size)
    begun = (grams[:, :, :-1] == sequences[:, None, sequences.shape[1] - size + 1 :]).all(-1)
    rows, places = torch.nonzero(begun, as_tuple=True)
    return scores.index_put((rows, grams[rows, places, -1]), scores.new_tensor(-torch.inf))


def _forbid(
    scores: Tensor, sequences: Tensor, bad_words: Sequence[Sequence[int]] | None, ends: Sequence[int]
) -> Tensor:
    """Scores (B, V) with -inf for each token that would complete one of `bad_words` behind `sequences` (B, T).

    A bad word that is just an end token is left allowed, or nothing could end.

    Raises:
        DataError: an empty bad word, or an id beyond the vocabulary.
    """
    if not bad_words:
        return scores
    scores = scores.clone()
    for word in bad_words:
        if not word or max(word) >= scores.shape[1] or min(word) < 0:
            raise DataError(f"bad_words_ids holds {list(word)}: give non-empty lists of ids below {scores.shape[1]}")
        before, last = list(word[:-1]), word[-1]
        if not before:
            if last not in ends:
                scores[:, last] = -torch.inf
        elif len(word) <= sequences.shape[1]:
            written = (sequences[:, -len(before) :] == torch.tensor(before, device=sequences.device)).all(1)
            scores[:, last] = scores[:, last].masked_fill(written, -torch.inf)
    return scores


def choose(logits: Tensor, settings: GenerationSettings) -> Tensor:
    """The next token (B,): the most likely one, or one drawn."""
    if not settings.do_sample:
        return logits.argmax(-1)
    probabilities = kept(logits, settings).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=settings.generator)[:, 0]


def kept(logits: Tensor, settings: GenerationSettings) -> Tensor:
    """Logits (B, V) over temperature, -inf for the tokens that top_k and top_p rule out."""
    if settings.temperature <= 0:
        raise DataError(
            f"temperature {settings.temperature} is not positive: for the most likely tokens, unset do_sample"
        )
    logits = logits / settings.temperature
    if settings.top_k:
        least = logits.topk(min(settings.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        # Dropped if the more likely tokens already hold top_p; the first never is.
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= settings.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(1, order, ordered)
    return logits
