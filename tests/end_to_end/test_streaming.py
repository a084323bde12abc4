"""A run whose shards come out of commands: it trains, says what it cannot promise, and goes on."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_training_on_pipes(m4train, digits_root, tmp_path):
    piped = [
        f"data.sources.documents.path='pipe:cat {digits_root}/documents/train-000000.tar'",
        "data.sources.documents.stream=true",
        "data.long_documents=drop",
        "trainer.max_steps=4",
    ]
    first = m4train("train", *piped, "trainer.stop_after=2")
    assert "Streaming without an index: there is no plan" in first.stderr
    m4train("train", *piped)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2, 3, 4]
    refused = m4train("replay --step 2", *piped, check=False)
    assert refused.returncode == 2
    assert "no index, no plan and nothing to replay" in refused.stderr
    mixed = m4train("train", *piped[:2], check=False)
    assert mixed.returncode == 2
    assert "data.long_documents=drop" in mixed.stderr
