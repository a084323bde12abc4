"""Multiple choice: which letter is meant by an answer, and the scores of MMMU, MathVista, MMStar, AI2D and ScienceQA.

An answer that names no letter is counted as `unparsed` and is wrong. MMMU's own code draws a letter for it instead, one
after the other from one stream, so that its results depend on the order of the samples: `mmmu_random`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from m4train.evaluation.metrics.open_answers import open_answer
from m4train.evaluation.metrics.said import Metric, Said, Scores, mean_scores

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_AROUND = (",", ".", "!", "?", ";", ":", "'")
_BETWEEN = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSED = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def lettered(options: Sequence[str]) -> dict[str, str]:
    """The options by their letters."""
    return dict(zip(LETTERS, options, strict=False))


def mmmu_letter(answer: str, options: dict[str, str]) -> str | None:
    """The letter that MMMU's parser reads: the last one in brackets, else between spaces, else, of an answer of more than five
    words, the option whose text comes last; None if there is none."""
    for mark in _AROUND:
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form in ("({})", " {} "):
        found = [letter for letter in options if form.format(letter) in answer]
        if found:
            return max(found, key=lambda letter: answer.rfind(form.format(letter)))
    lower = answer.lower()
    if len(answer.split()) > 5:
        found = [letter for letter, text in options.items() if text.lower() in lower]
        if found:
            return max(found, key=lambda letter: lower.rfind(options[letter].lower()))
    return None


def inferred_letter(answer: str, options: dict[str, str]) -> str | None:
    """The letter that VLMEvalKit reads without a judge: the only one among the words, else the only option whose text is
    contained; None if there is none."""
    if any(refusal in answer for refusal in _REFUSED):
        return None
    words = answer.translate(_BETWEEN).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        return found[0]
    if not found and "Z" in words:  # how that code writes that none was found
        return None
    contained = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def multiple_choice(said: Sequence[Said]) -> Scores:
    """The share of answers whose inferred letter is the reference: MMStar, AI2D, ScienceQA."""
    letters = [inferred_letter(each.answer, lettered(each.options)) for each in said]
    samples = [float(letter in each.references) for letter, each in zip(letters, said)]
    return mean_scores(samples, {"unparsed": letters.count(None)})


def _mmmu(said: Sequence[Said], drawn: bool = False) -> Scores:
    """Multiple choice by MMMU's parser, and open questions, which have no options."""
    generator = random.Random(42)
    samples, unparsed = [], 0
    for each in said:
        if not each.options:
            samples.append(open_answer(each.answer, each.references))
            continue
        options = lettered(each.options)
        letter = mmmu_letter(each.answer, options)
        unparsed += letter is None
        if letter is None and drawn:
            letter = generator.choice(list(options))
        samples.append(float(letter in each.references))
    return mean_scores(samples, {"unparsed": unparsed})


mmmu: Metric = _mmmu
mmmu_random: Metric = partial(_mmmu, drawn=True)
