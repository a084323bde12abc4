"""The documents of the first packs as lines for a table: what is trained on, what is not, and the pictures."""

from __future__ import annotations

from itertools import islice
from typing import Any

from m4train.config import Config
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan
from m4train.inspection.preview import SegmentView, view_pack
from m4train.processing.protocol import SampleProcessor


def first_packs(plan: Plan, processor: SampleProcessor, config: Config) -> list[dict[str, Any]]:
    """A line for each document of the first `logging.first_packs` packs."""
    collator = Collator(plan.sources, processor, config.data, config.seed)
    packs = islice((pack for step in plan.steps() for pack in step.packs), config.logging.first_packs)
    return [_line(pack.number, segment) for pack in packs for segment in view_pack(collator, pack).segments]


def _line(pack: int, segment: SegmentView) -> dict[str, Any]:
    return {
        "pack": pack,
        "source": segment.source,
        "key": segment.key,
        "tokens": segment.tokens,
        "loss_tokens": segment.loss_tokens,
        "spans": [{"kind": span.kind, "tokens": span.tokens, "text": span.text} for span in segment.spans],
        "images": [frame for span in segment.spans for frame in span.frames],
        "problem": segment.problem,
    }
