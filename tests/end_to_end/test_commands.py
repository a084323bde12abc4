"""The commands, one after another, as a newcomer runs them, on a run of some seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

pytestmark = pytest.mark.slow


def test_a_model_lives_its_whole_life(m4train, digits_root, tmp_path):
    pretrained = tmp_path / "pretrained"
    stage = (f"run_dir={pretrained}", "logging=offline")
    m4train("train", *stage)
    m4train("export", *stage)
    steps = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {"loss/documents", "grad_norm", "lr", "data_hash", "padding_fraction", "tokens_per_second"} <= set(steps[-1])
    assert list((pretrained / "wandb").glob("offline-run-*"))

    sft = (
        "experiment=digits_sft",
        f"model.pretrained={pretrained / 'export'}",
        "data=digits_conversations",
        "evaluation.max_samples=20",
    )
    m4train("train", *sft)
    said = m4train("evaluate", *sft).stdout
    assert "single: loss" in said
    assert "exact match" in said
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["single"]["count"] == scores["multi"]["count"] == 20
    assert 0 <= scores["multi"]["exact_match"] <= 1

    m4train("export", *sft)
    _compare(tmp_path / "run" / "export")
    m4train("report", *sft)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") >= 2
    assert "data:image/png;base64," in page
    assert "digits_pretrain" in page  # the run before, found through the exported folder
    assert "http" not in page.replace("http://www.w3.org", "")  # opens offline


def _compare(folder):
    """The export holds no adapter, and m4train and transformers agree on it."""
    compared = subprocess.run(
        [sys.executable, str(LAUNCH / "compare_with_transformers.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "the two agree" in compared.stdout
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert not [name for name in tensors.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118


def test_full_fine_tuning_from_random_weights(m4train, tmp_path):
    m4train("train", "experiment=digits_sft", "adapter=none", "freeze=none", "trainer.max_steps=2", "seed=1")
    table = json.loads((tmp_path / "run" / "parameters.json").read_text())
    assert table[-1]["trainable"] == table[-1]["parameters"]


def test_what_trains_is_what_the_rules_say(m4train, tmp_path):
    m4train("train", "experiment=digits_sft", "trainer.max_steps=2")
    table = {row["part"]: row for row in json.loads((tmp_path / "run" / "parameters.json").read_text())}
    assert table["vision"]["trainable"] == table["embeddings"]["trainable"] == 0
    assert table["connector"]["trainable"] == table["connector"]["parameters"]
    assert table["text"]["trainable"] == table["text"]["adapted"] > 0


def test_a_run_directory_of_another_configuration_is_refused(m4train):
    m4train("train")
    refused = m4train("train", "seed=5", check=False)
    assert refused.returncode == 1
    assert "seed" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "trained already" in m4train("train").stdout


def test_commands_that_need_a_run_say_so(m4train):
    for command in ("evaluate", "export", "report"):
        refused = m4train(command, check=False)
        assert refused.returncode == 1
        assert "train first" in refused.stderr, refused.stderr


def test_the_index_can_be_built_and_described(m4train):
    m4train("data", "index", check=False)
    done = subprocess.run([sys.executable, "-m", "m4train", "data", "sats"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "index, stats" in done.stderr
