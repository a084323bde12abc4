"""The metrics by name, and functions of one's own."""

from __future__ import annotations

import importlib

from m4train.errors import ConfigError
from m4train.evaluation.metrics.choices import mmmu, mmmu_random, multiple_choice
from m4train.evaluation.metrics.cider import cider
from m4train.evaluation.metrics.said import Metric, per_answer
from m4train.evaluation.metrics.texts import anls, exact_match, ocrbench, perplexity, relaxed_accuracy
from m4train.evaluation.metrics.vqa import textvqa_accuracy, vqa_accuracy
from m4train.evaluation.metrics.vqa_lenient import vqa_accuracy_lenient
from m4train.evaluation.metrics.yes_no import hallusionbench, mme

METRICS: dict[str, Metric] = {
    "exact_match": per_answer(exact_match),
    "vqa_accuracy": per_answer(vqa_accuracy),
    "vqa_accuracy_lenient": per_answer(vqa_accuracy_lenient),
    "textvqa_accuracy": per_answer(textvqa_accuracy),
    "anls": per_answer(anls),
    "relaxed_accuracy": per_answer(relaxed_accuracy),
    "multiple_choice": multiple_choice,
    "mmmu": mmmu,
    "mmmu_random": mmmu_random,
    "ocrbench": ocrbench,
    "cider": cider,
    "mme": mme,
    "hallusionbench": hallusionbench,
    "perplexity": perplexity,
}
OF_WHOLE_SETS = frozenset({"cider"})  # scores that change with the samples around them


def load_metric(name: str) -> Metric:
    """The metric of that name, or the function `package.module:function`, called as function(answer, references).

    Raises ConfigError if there is none.
    """
    if name in METRICS:
        return METRICS[name]
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(METRICS)
        raise ConfigError(
            f"evaluation.metric is {name!r}, but must be {known} or package.module:function ({error})."
        ) from error
    return per_answer(function)


def metric_name(name: str) -> str:
    """What a metric is called in results."""
    return name.partition(":")[2] or name
