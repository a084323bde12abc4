"""A newcomer's walk: a JSON file of one's own, configurations of one's own, a sweep of three learning rates, and what won."""

import json

import pytest

from m4train import cli
from m4train.processing.tokenizer_training import train_bpe_tokenizer
from tests.helpers import warm
from tests.helpers.data import digit_pictures
from tests.helpers.hub_server import connected

pytestmark = pytest.mark.slow
EXPERIMENT = """
defaults:
  - override /model: tiny_idefics3
  - override /data: mine
name: mine
model: {tokenizer: tokenizer}
optimizer: {lr: 1.0e-3}
schedule: {warmup_steps: 1}
trainer:
  max_steps: 6
  global_batch_size: 2
  micro_batch_size: 1
  precision: fp32
  eval_every: 3
  save_every: 6
  log_every: 1
logging: {wandb: disabled}
threads: 1
"""
DATA = """
prepare: null
sequence_length: 256
num_workers: 1
holdout: 0.2
sources:
  mine: {path: mine/train.json, format: auto}
"""
RATES = ("0.001", "0.003", "0.01")


@pytest.fixture
def project(tmp_path):
    """A folder with mine/train.json, its pictures, a tokenizer, and conf/."""
    folder = tmp_path / "mine"
    folder.mkdir()
    pictures, digits = digit_pictures()
    records = []
    for number in range(40):
        pictures[number].convert("RGB").save(folder / f"{number}.jpg")
        said = [("user", "<image>Which digit is this?"), ("assistant", f"A {digits[number]}.")]
        messages = [{"role": role, "content": text} for role, text in said]
        records.append({"images": [f"{number}.jpg"], "messages": messages})
    (folder / "train.json").write_text(json.dumps(records))
    texts = [turn["content"] for record in records for turn in record["messages"]]
    train_bpe_tokenizer(texts * 4, 512, tmp_path / "tokenizer")
    for name, text in {"experiment": EXPERIMENT, "data": DATA}.items():
        (tmp_path / "conf" / name).mkdir(parents=True)
        (tmp_path / "conf" / name / "mine.yaml").write_text(text)
    return tmp_path


def command(folder, *arguments, ready=1, **environment):
    run = warm.start_command(*arguments, folder=folder, ready=ready, **environment)
    assert run.wait(timeout=400) == 0, run.said()
    return run.output.read_text()


def test_from_a_json_file_to_the_best_of_three_runs_on_the_hub(project, monkeypatch):
    checked = json.loads(command(project, "validate", "--workers", "1", "--json", "experiment=mine"))
    assert checked["failed"] == []
    assert checked["sources"]["mine"]["samples"] > 0

    sweep = ["train", "-m", "experiment=mine", f"optimizer.lr={','.join(RATES)}"]
    said = command(project, *sweep, ready=6)  # each run, and the server of its data processes
    assert said.count("sweep: optimizer.lr=") == 3
    folder = project / "runs" / "mine"
    names = [f"optimizer.lr={rate}" for rate in RATES]
    assert sorted(path.parent.name for path in folder.glob("*/metrics.jsonl")) == names

    found = json.loads(command(project, "compare", "runs/mine", "--metric", "eval/loss", "--json"))
    assert {run["differs"]["optimizer.lr"] for run in found["runs"]} == {float(rate) for rate in RATES}
    scores = [run["best"] for run in found["runs"]]
    assert scores == sorted(scores)
    assert "<svg" in (project / "compare.html").read_text()

    best = found["runs"][0]["run"]
    monkeypatch.chdir(project)
    with connected(project / "cache") as hub:
        assert cli.main(["export", f"run_dir={best}", "--push-to", "me/digits", "--private"]) == 0
        pushed = hub.model("me/digits")
        assert pushed.private
        assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= set(pushed.commits[-1][1])
