"""The lines of the first packs, against what the batches of those packs train on."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from m4train.config import Config
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan
from m4train.inspection.pack_lines import first_packs
from tests.helpers.data import FakeProcessor, make_sources


def test_the_lines_of_a_plan_are_what_its_batches_train_on(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, 12, 8)
    plan, processor = Plan(sources, data, 0, 2), FakeProcessor()
    config = Config(data=data, seed=0)
    config.logging.first_packs = 3  # the first step has two
    lines = first_packs(plan, processor, config)
    collator = Collator(sources, processor, data, 0)
    packs = [pack for step, _ in zip(plan.steps(), range(2)) for pack in step.packs][:3]
    found = [list(held) for _, held in groupby(lines, lambda line: line["pack"])]
    assert [held[0]["pack"] for held in found] == [pack.number for pack in packs]
    assert {line["source"] for line in lines} == {"pages", "digits"}
    for pack, held in zip(packs, found, strict=True):
        batch, _ = collator.batch([pack], 1)
        spans = [span for line in held for span in line["spans"]]
        trained = [span for span in spans if span["kind"] == "trained"]
        assert "".join(span["text"] for span in trained) == processor.decode(batch.targets.numpy())
        assert sum(span["tokens"] for span in trained) == batch.loss_tokens == sum(line["loss_tokens"] for line in held)
        assert sum(span["tokens"] for span in spans) == batch.tokens == sum(line["tokens"] for line in held)
        assert sum(len(line["images"]) for line in held) == batch.images.count
        assert [(line["source"], line["key"]) for line in held] == [(d.source, d.key) for d in batch.documents]
