"""The model card of an export: data, settings, curves, scores, licence, use."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from m4train.commands.model_card import write_card
from m4train.config import SourceConfig
from m4train.training.checkpoints.state import Checkpoint
from tests.helpers.training import make_config


@pytest.fixture
def run(tmp_path):
    config = make_config(tmp_path, max_steps=9)
    config.data.sources = {
        "own": SourceConfig(path="/home/someone/secret project/data/train.json", weight=2),
        "pages": SourceConfig(path="hf://datasets/org/pages@main/*.parquet"),
        "store": SourceConfig(path="s3://me:hunter2@bucket/*.tar"),
    }
    rows = [{"step": step, "loss": 3.0 / step, "eval/loss": 2.0} for step in range(1, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"web": {"loss": 1.25, "metric": "exact_match", "exact_match": 0.5, "count": 8}}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    return config


def card_of(config, folder: Path, base: str | None = None) -> tuple[dict, str]:
    folder.mkdir()
    state = {"step": 5, "versions": {"m4train": "0.1.0", "torch": "2.11", "revision": "abc"}}
    write_card(config, Checkpoint(folder, state), folder, "org/name", base)
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_it_says_all_that_the_run_knows(run, tmp_path):
    run.export.license = "apache-2.0"
    run.model.pretrained = "HuggingFaceTB/SmolVLM-256M-Instruct@main"
    front, text = card_of(run, tmp_path / "export")
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "HuggingFaceTB/SmolVLM-256M-Instruct"
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "image-text-to-text")
    for part in ("## Data", "## Settings", "## Curves", "## Scores", "## Licence", "## Use"):
        assert part in text
    assert "Trained for 5 optimizer steps of 8 packs" in text
    assert "| own | data/train.json | 2 |" in text
    assert "| pages | hf://datasets/org/pages@main/*.parquet | 1 |" in text
    assert "| web | 1.2500 | 50.0% (exact_match of 8) |" in text
    assert f"| optimizer.lr | {run.optimizer.lr} |" in text
    assert "apache-2.0. The licences of the data" in text
    assert 'AutoModelForImageTextToText.from_pretrained("org/name"' in text


def test_nothing_of_the_machine_or_its_passwords_is_on_it(run, tmp_path):
    _, text = card_of(run, tmp_path / "export")
    for secret in ("hunter2", "someone", str(tmp_path)):
        assert secret not in text


def test_the_curves_are_a_picture_up_to_the_checkpoint(run, tmp_path):
    card_of(run, tmp_path / "export")
    root = ElementTree.parse(tmp_path / "export" / "curves.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    labels = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"training", "held-out", "step"} <= set(labels)
    assert "9" not in labels  # the checkpoint is of step 5


def test_without_a_licence_metrics_and_scores_it_says_less(run, tmp_path):
    for name in ("metrics.jsonl", "evaluation.json"):
        (tmp_path / name).unlink()
    front, text = card_of(run, tmp_path / "export")
    assert "license" not in front
    assert "base_model" not in front
    assert "None was chosen for these weights" in text
    assert "## Curves" not in text
    assert "## Scores" not in text
    assert not (tmp_path / "export" / "curves.svg").exists()


def test_an_adapter_is_used_with_its_base(run, tmp_path):
    front, text = card_of(run, tmp_path / "export", "org/base")
    assert front["library_name"] == "peft"
    assert 'AutoModelForImageTextToText.from_pretrained("org/base"' in text
    assert 'PeftModel.from_pretrained(model, "org/name")' in text
