"""Questions to be answered with yes or no, several about one picture: MME, and the rule part of HallusionBench."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from m4train.errors import DataError
from m4train.evaluation.metrics.said import Said, Scores, half_width, mean_scores

_PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]


def mme(said: Sequence[Said]) -> Scores:
    """The sum over categories of accuracy + accuracy of pictures of which both questions are answered right, in points.

    Of 2,800 points, 2,000 are for perception and 800 for cognition (`others`).
    """
    samples = [float(_yes_or_no(each.answer) == each.references[0].lower().strip().replace(".", "")) for each in said]
    pictures: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score, each in zip(samples, said):
        pictures[str(each.about["category"])][each.about["question_id"]].append(score)
    for category, found in pictures.items():
        wrong = next((picture for picture, scores in found.items() if len(scores) != 2), None)
        if wrong is not None:
            raise DataError(
                f"MME asks two questions of each picture, but {category}/{wrong} has {len(found[wrong])}: score whole pairs, "
                "without max_samples."
            )
    points = {
        category: [100 * (sum(scores) / 2 + (sum(scores) == 2)) for scores in found.values()]
        for category, found in pictures.items()
    }
    means = {category: math.fsum(values) / len(values) for category, values in points.items()}
    half = math.hypot(*(half_width(values) for values in points.values()))
    value = math.fsum(means.values())
    perception = math.fsum(mean for category, mean in means.items() if category in _PERCEPTION)
    others = {"perception": perception, "cognition": value - perception}
    return Scores(samples, value, (value - half, value + half), shown_times=1.0, others=others)


def _yes_or_no(answer: str) -> str | None:
    answer = answer.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer)
    start = answer if answer in ("yes", "no") else answer[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def hallusionbench(said: Sequence[Said]) -> Scores:
    """Accuracy of all questions by rule: "yes" anywhere in the answer is a yes, all else a no. `others`: the share of
    questions, and of figures, that are answered right throughout."""
    samples = [float(("1" if "yes" in each.answer.lower() else "0") == str(each.references[0])) for each in said]
    others = {}
    for name, column in (("questions", "question_id"), ("figures", "figure_id")):
        groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for score, each in zip(samples, said):
            groups[tuple(str(each.about[key]) for key in ("category", "subcategory", "set_id", column))].append(score)
        others[name] = sum(min(scores) for scores in groups.values()) / len(groups)
    return mean_scores(samples, others=others)
