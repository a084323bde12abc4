"""Beam search over a batch of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m4train.models.outputs import GenerateOutput, Record
from m4train.models.sampling import constrain, drawn, kept
from m4train.models.stopping import Stopping

if TYPE_CHECKING:
    from m4train.models.decoding import DecodingSteps
    from m4train.models.generation_settings import GenerationSettings

_NEVER = -1e9  # score of a beam that must not be chosen


@dataclass
class _Prompt:
    """Finished continuations of one prompt, best first, as (score, ids, rows they came from); `open` while a running one may still enter."""

    finished: list[tuple[float, list[int], list[int]]] = field(default_factory=list)
    open: bool = True


def beam_search(
    steps: DecodingSteps, input_ids: Tensor, settings: GenerationSettings, new: int, pad: int
) -> GenerateOutput:
    """The best sequences of each prompt (B * num_return_sequences, T + longest), best first, `pad` after the short ones."""
    search = _Search(input_ids, steps.real(input_ids), settings, new)
    scores, record = steps(), Record(settings)
    rows = torch.arange(input_ids.shape[0], device=input_ids.device).repeat_interleave(settings.num_beams)
    steps.select(rows)
    scores = scores[rows]
    for length in range(1, new + 1):
        allowed = search.allowed(scores.log_softmax(-1))
        record.add(scores, allowed)
        parents = search.advance(allowed, length)
        if length == new or search.done():
            break
        steps.select(parents)
        scores = steps(search.running[:, -1])
    best = search.best(settings.num_return_sequences)
    longest = max(len(ids) for ids in best)
    pad = pad or next(iter(settings.ends), pad)  # as the reference fills up beams: a pad id of 0 counts as none
    rest = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in best], device=input_ids.device)
    sequences = torch.cat((input_ids.repeat_interleave(settings.num_return_sequences, 0), rest), dim=1)
    values = torch.tensor(search.values(settings.num_return_sequences), device=input_ids.device)
    origins = search.origins(settings.num_return_sequences, longest).to(input_ids.device)
    return record.output(sequences, values if settings.output_scores else None, origins)


class _Search:
    def __init__(self, input_ids: Tensor, real: Tensor, settings: GenerationSettings, new: int) -> None:
        self.settings, self.new = settings, new
        self.beams, self.batch = settings.num_beams, input_ids.shape[0]
        self.running = input_ids.repeat_interleave(self.beams, 0)  # (B * beams, T)
        # Of each running beam, on the host: its new tokens, and the row whose scores each was chosen by.
        self.ids: list[list[int]] = [[] for _ in self.running]
        self.came: list[list[int]] = [[] for _ in self.running]
        self.real = real.repeat_interleave(self.beams, 0)  # beams never leave the rows of their prompt
        # All beams of a prompt start equal: only the first may be continued.
        self.scores = torch.full((self.batch, self.beams), _NEVER, device=input_ids.device)
        self.scores[:, 0] = 0.0
        self.prompts = [_Prompt() for _ in range(self.batch)]
        self.stopping = Stopping(settings, input_ids.device)

    def allowed(self, log_probs: Tensor) -> Tensor:
        """Log probabilities (B * beams, V) of what may follow the running beams."""
        return kept(constrain(log_probs, self.running, self.settings, self.real), self.settings)

    def advance(self, log_probs: Tensor, length: int) -> Tensor:
        """Extends the running beams by one token, to `length` new ones; returns the row (B * beams,) each came from."""
        ends = self.settings.ends
        vocab = log_probs.shape[1]
        total = (log_probs.view(self.batch, self.beams, vocab) + self.scores[:, :, None]).flatten(1)
        # Enough candidates that, if every beam ends in every possible way, as many as there are beams go on.
        count = min(max(2, 1 + len(ends)) * self.beams, total.shape[1])
        places = drawn(total, count, self.settings) if self.settings.do_sample else total.topk(count).indices
        values, tokens, parents = total.gather(1, places), places % vocab, places // vocab
        parent_rows = parents + torch.arange(self.batch, device=tokens.device)[:, None] * self.beams
        candidates = torch.cat((self.running[parent_rows.flatten()], tokens.flatten()[:, None]), dim=1)
        ended = self.stopping(candidates).view_as(tokens) | (length == self.new)
        self.scores, kept = (values + ended * _NEVER).topk(self.beams)
        rows, added = parent_rows.gather(1, kept), tokens.gather(1, kept)
        chosen = rows.flatten()
        self.running = torch.cat((self.running[chosen], added.view(-1, 1)), dim=1)
        best = [each[:, : self.beams].double() for each in (values, tokens, parent_rows, ended)]
        # The one time that the host waits for this token: ids and scores are exact in double precision.
        told = torch.stack((*best, rows.double(), added.double(), self.scores.double()), dim=1).tolist()
        self._finish(told, length)
        self._follow(told)
        self._close([scores[0] for *_, scores in told], length)
        return chosen

    def _finish(self, told: list[list[list[float]]], length: int) -> None:
        """Files the candidates that ended, if they are among the best `beams`."""
        for prompt, (values, tokens, rows, ended, *_) in zip(self.prompts, told, strict=True):
            full = self.settings.early_stopping is True and len(prompt.finished) == self.beams
            if not prompt.open or full:
                continue
            for value, token, row in (each[:3] for each in zip(values, tokens, rows, ended, strict=True) if each[3]):
                ids, came = [*self.ids[int(row)], int(token)], [*self.came[int(row)], int(row)]
                prompt.finished.append((value / length**self.settings.length_penalty, ids, came))
            prompt.finished.sort(key=lambda entry: entry[0], reverse=True)
            del prompt.finished[self.beams :]

    def _follow(self, told: list[list[list[float]]]) -> None:
        """Takes note of where the running beams came from, and by which tokens."""
        steps = [
            (int(row), int(token)) for *_, rows, tokens, _ in told for row, token in zip(rows, tokens, strict=True)
        ]
        self.ids = [[*self.ids[row], token] for row, token in steps]
        self.came = [[*self.came[row], row] for row, _ in steps]

    def _close(self, best_scores: list[float], length: int) -> None:
        """Closes the prompts whose running beams can no longer enter the finished ones."""
        penalty = self.settings.length_penalty
        hoped = self.new if self.settings.early_stopping == "never" and penalty > 0 else length
        for prompt, best in zip(self.prompts, best_scores, strict=True):
            if len(prompt.finished) == self.beams and best / hoped**penalty <= prompt.finished[-1][0]:
                prompt.open = False

    def done(self) -> bool:
        full = all(len(prompt.finished) == self.beams for prompt in self.prompts)
        return not any(prompt.open for prompt in self.prompts) or (full and self.settings.early_stopping is True)

    def values(self, count: int) -> list[float]:
        """The score of each of the `best`."""
        return [score for prompt in self.prompts for score, _, _ in prompt.finished[:count]]

    def origins(self, count: int, longest: int) -> Tensor:
        """(rows, longest) the row of scores each new token of the `best` was chosen by; -1 behind their ends."""
        rows = [came for prompt in self.prompts for _, _, came in prompt.finished[:count]]
        return torch.tensor([came + [-1] * (longest - len(came)) for came in rows])

    def best(self, count: int) -> list[list[int]]:
        return [ids for prompt in self.prompts for _, ids, _ in prompt.finished[:count]]
