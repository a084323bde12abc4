"""Data from the Hub at a revision, a run on it, its export to the Hub, and models that start from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import m4train
from m4train import build
from m4train.cli import main
from m4train.config.compose import load_config
from tests.helpers.data import conversations, write_shards
from tests.helpers.hub_server import Hub, connected
from tests.helpers.processing import tokenizer_folder

pytestmark = pytest.mark.slow


def small(run_dir: Path, data: str, index: Path) -> list[str]:
    """A run of two steps on one source, on one core."""
    return [
        "experiment=digits_pretrain",
        "data=digits_conversations",
        "data.prepare=null",
        "~data.sources.multi",
        "~data.validation.single",
        "~data.validation.multi",
        f"data.sources.single.path={data}",
        f"data.index_dir={index}",
        "data.num_workers=0",
        "data.sequence_length=256",
        f"model.tokenizer={tokenizer_folder()}",
        f"run_dir={run_dir}",
        "trainer.max_steps=2",
        "trainer.log_every=1",
        "trainer.eval_every=0",
        "trainer.global_batch_size=1",
        "trainer.micro_batch_size=1",
        "schedule.warmup_steps=0",
        "logging=none",
    ]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with connected(tmp_path_factory.mktemp("hub") / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on a revision of a data set whose newest one holds nothing that could be trained on."""
    folder = tmp_path_factory.mktemp("run")
    (shard,) = write_shards(folder / "shards", conversations(8))
    revision = hub.add("dataset", "me/digits", {"train/a.tar": shard.read_bytes()}, private=True)
    hub.add("dataset", "me/digits", {"train/a.tar": b"no tar file"}, private=True)
    source = f"hf://datasets/me/digits@{revision}/train/*.tar"
    assert main(["train", *small(folder / "run", source, folder / "index")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def pushed(hub: Hub, run: Path) -> str:
    """The commit of `m4train export --push-to`; a later one in the repository is not a model."""
    asked = ["export", f"run_dir={run}", "export.verify=false", "--push-to", "me/reader", "--private"]
    assert main(asked) == 0
    commit = hub.model("me/reader").commits[-1][0]
    hub.add("model", "me/reader", {"config.json": b"{}"})
    return commit


def test_a_run_on_a_revision_of_a_hub_dataset(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 and line["images"] > 0 for line in lines)
    assert lines[1]["tokens_seen"] == lines[0]["tokens"] + lines[1]["tokens"]
    assert 0 <= lines[0]["epoch"] <= lines[1]["epoch"]
    assert lines[1]["epoch"] > 0
    assert {"lr/text", "lr/vision", "lr/connector"} <= lines[1].keys()


def same(model: Any, folder: Path) -> None:
    stored = m4train.AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def test_what_was_pushed_is_a_model_of_m4train_and_of_transformers(
    hub: Hub, run: Path, pushed: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    logits = []
    for library in (m4train, transformers):
        place = {"revision": pushed, "cache_dir": str(tmp_path / library.__name__)}
        model = library.AutoModelForImageTextToText.from_pretrained("me/reader", **place).eval()
        processor = library.AutoProcessor.from_pretrained("me/reader", **place)
        ids = torch.tensor([processor.tokenizer("Which digit is this?")["input_ids"]])
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.allclose(*logits, atol=1e-4)
    same(m4train.AutoModelForImageTextToText.from_pretrained(f"me/reader@{pushed}"), run / "export")


def test_a_run_starts_from_a_revision_of_a_hub_model(hub: Hub, run: Path, pushed: str, tmp_path: Path) -> None:
    arguments = [one for one in small(tmp_path, "x", tmp_path) if not one.startswith("model.")]
    config = load_config(
        ["experiment=digits_sft", *arguments[1:], f"model.pretrained=me/reader@{pushed}", "adapter=none"]
    )
    same(build.build_model(config, build.build_processor(config)), run / "export")
