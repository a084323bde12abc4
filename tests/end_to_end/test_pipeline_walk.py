"""The walk of docs/pipelines.md, as it is written there: from real pages to a tiny Idefics2 on the shards they became."""

import json
import re
import shlex
from pathlib import Path

import pytest

from data_pipelines.frame.store import read_documents
from m4train.cli import main
from tests.helpers import warm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def commands():
    """The words of the commands between the heading of the walk and the next one."""
    text = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8").partition("## A walk")[2].partition("\n## ")[0]
    return [shlex.split(line)[1:] for line in re.findall(r"^    (m4train .*)$", text, re.MULTILINE)]


def test_from_pages_to_a_model(tmp_path, monkeypatch):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    web, tokenizer, train = commands()
    assert main(web) == 0
    documents = [
        document for rank in range(2) for document in read_documents(tmp_path / "walk" / "web" / "once", rank, 2)
    ]
    assert len({document.metadata["url"] for document in documents}) == 40
    dataset = json.loads((tmp_path / "walk" / "web" / "write" / "dataset.json").read_text())
    assert sum(split["samples"] for split in dataset["counts"].values()) == 40
    assert main(tokenizer) == 0
    run = warm.start_command(*train, "trainer.precision=fp32", "trainer.log_every=1", folder=tmp_path)
    assert run.wait(timeout=240) == 0, run.said()
    rows = [json.loads(line) for line in (tmp_path / "walk" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5]) - 3
    assert sum(row["images"] for row in rows) > 50
    assert sum(row["quarantined"] for row in rows) == 0
