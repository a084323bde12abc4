"""From logits to the next token: what must not follow, temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m4train.errors import DataError

if TYPE_CHECKING:
    from m4train.models.generation_settings import GenerationSettings


def constrain(scores: Tensor, sequences: Tensor, settings: GenerationSettings, real: Tensor) -> Tensor:
    """Scores (B, V) of what may follow `sequences` (B, T), -inf for what may not; `real` (B, prompt) bool is False at padding.

    Raises:
        DataError: impossible bad words.
    """
    begun = sequences.shape[1] - real.shape[1]
    if settings.repetition_penalty != 1.0:
        scores = _penalised(scores, sequences, settings.repetition_penalty, real)
    if 0 < settings.no_repeat_ngram_size <= sequences.shape[1]:
        scores = _without_repeats(scores, sequences, settings.no_repeat_ngram_size)
    never = (*(settings.suppress_tokens or []), *(settings.ends if begun < (settings.min_new_tokens or 0) else []))
    if never:
        every = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(torch.isin(every, _on(scores.device, never)), -torch.inf)
    scores = _forbid(scores, sequences, settings.bad_words_ids, settings.ends)
    for processor in settings.logits_processor or []:
        scores = processor(sequences, scores)
    return scores


@lru_cache(maxsize=64)
def _on(device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """The ids (n,) on `device`; kept, because to copy them for each token would be to wait for each token."""
    with torch.inference_mode(False):
        return torch.tensor(ids, dtype=torch.int64, device=device)


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
    vocab = scores.shape[1]
    ids = grams[:, :, -1].masked_fill(~begun, vocab)  # beyond the vocabulary, where nothing has begun
    repeated = torch.zeros(scores.shape[0], vocab + 1, dtype=torch.bool, device=scores.device).scatter(1, ids, True)
    return scores.masked_fill(repeated[:, :vocab], -torch.inf)


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
        before, last = tuple(word[:-1]), word[-1]
        if not before:
            if last not in ends:
                scores[:, last] = -torch.inf
        elif len(word) <= sequences.shape[1]:
            written = (sequences[:, -len(before) :] == _on(sequences.device, before)).all(1)
            scores[:, last] = scores[:, last].masked_fill(written, -torch.inf)
    return scores


def drawn(scores: Tensor, count: int, settings: GenerationSettings) -> Tensor:
    """(B, count) places of each row of `scores` (B, V), without repeats, drawn by their probability."""
    return torch.multinomial(scores.softmax(-1), count, generator=settings.generator)


def choose(scores: Tensor, settings: GenerationSettings) -> Tensor:
    """The next token (B,) by the scores that are `kept`: the most likely one, or one drawn."""
    return drawn(scores, 1, settings)[:, 0] if settings.do_sample else scores.argmax(-1)


def kept(logits: Tensor, settings: GenerationSettings) -> Tensor:
    """Scores (B, V): if tokens are drawn, `logits` (B, V) over temperature, -inf for those that top_k, top_p and min_p rule out.

    Beams keep as many as they need to go on, whatever ends.
    """
    if not settings.do_sample:
        return logits
    if settings.temperature <= 0:
        raise DataError(
            f"temperature {settings.temperature} is not positive: for the most likely tokens, unset do_sample"
        )
    fewest = max(2, len(settings.ends) + 1) if settings.num_beams > 1 else 1
    logits = logits / settings.temperature
    if settings.top_k:
        most = min(max(settings.top_k, fewest), logits.shape[1])
        logits = logits.masked_fill(logits < logits.topk(most).values[:, -1:], -torch.inf)
    if settings.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        # Dropped if the more likely tokens already hold top_p; the first never are.
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        before[:, :fewest] = 0
        ordered = ordered.masked_fill(before >= settings.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(1, order, ordered)
    if settings.min_p:
        likely = logits.softmax(-1)
        rare = likely < settings.min_p * likely.amax(-1, keepdim=True)
        rare = rare.scatter(1, logits.topk(fewest).indices, False)
        logits = logits.masked_fill(rare, -torch.inf)
    return logits
