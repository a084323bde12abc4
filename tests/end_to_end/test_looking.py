"""The commands that look at the data of a run, on the command line."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_what_is_looked_at_is_what_is_trained_on(m4train, tmp_path):
    planned = json.loads(m4train("plan --ranks 2 --json").stdout)
    assert planned["steps"] == planned["max_steps"] == 12
    checked = json.loads(m4train("validate --workers 1 --json", "data.validation={}").stdout)
    assert checked["failed"] == []
    assert checked["sources"]["documents"]["bad"] == 0
    measured = json.loads(m4train("bench --packs 4 --json").stdout)
    assert measured["packs"] == 4
    assert measured["whole"]["tokens_per_second"] > 0
    m4train("preview --packs 2")
    assert "trained on" in (tmp_path / "run" / "preview.html").read_text()

    m4train("train", "trainer.stop_after=4")
    replayed = json.loads(m4train("replay --step 3 --json").stdout)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert replayed["data_hash"] == replayed["logged_data_hash"] == logged[2]["data_hash"]
    assert sum(sample["loss_tokens"] for sample in replayed["samples"]) == logged[2]["loss_tokens"]
