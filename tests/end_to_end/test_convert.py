"""Shards from shards: `m4train data convert`, and again where it stopped."""

import json

import pytest

from m4train.data.shards import expand_shards

pytestmark = pytest.mark.slow


def test_the_converted_shards_hold_every_sample(m4train, tmp_path):
    counts = json.loads(m4train(f"data convert to={tmp_path / 'out'} workers=2").stdout)
    stats = json.loads(m4train("data stats").stdout)
    assert {name: found["written"] for name, found in counts.items()} == {n: s["samples"] for n, s in stats.items()}
    assert expand_shards(str(tmp_path / "out" / "documents-*.tar"))
    again = f"data.sources.documents.path={tmp_path}/out/documents-*.tar"
    assert json.loads(m4train("data stats", again).stdout)["documents"] == stats["documents"] | {"shards": 1}
