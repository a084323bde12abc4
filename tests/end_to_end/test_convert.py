"""Shards from shards: `m4train data convert`."""

import json

import pytest
import webdataset

from m4train.data.shards import expand_shards

pytestmark = pytest.mark.slow


def test_the_converted_shards_hold_every_sample(m4train, digits_root, tmp_path):
    counts = json.loads(m4train(f"data convert --out {tmp_path / 'out'} --workers 2").stdout)
    for name, folder in {"documents": "train", "validation/documents": "heldout"}.items():
        before = expand_shards(str(digits_root / "documents" / f"{folder}-*.tar"))
        after = expand_shards(str(tmp_path / "out" / f"{name.replace('/', '-')}-*.tar"))
        images = [  # the first of each; some documents have none
            [sample.get("0.png") for sample in webdataset.WebDataset(shards, shardshuffle=False)]
            for shards in (before, after)
        ]
        assert counts[name] == {"written": len(images[0])}
        assert images[0] == images[1]
