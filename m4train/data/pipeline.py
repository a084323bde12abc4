"""The planned samples as a webdataset pipeline, for those who bring their own loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from m4train.data.convert import canonical
from m4train.data.loading.rank_plan import RankPlan
from m4train.data.plan.plan import Plan
from m4train.errors import BadSample

_LOG = logging.getLogger(__name__)


def planned_pipeline(
    plan: Plan,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int = 1,
    state: dict[str, Any] | None = None,
    stop_step: int | None = None,
) -> Any:
    """A `webdataset.DataPipeline` over the samples of `plan` that fall to `rank`, in the order in which they are trained on.

    Each is a dict as webdataset gives it: `__key__`, `__url__`, `json` and `0.jpg`, `1.png` ... with their stored bytes;
    and `__source__`, `__step__`, `__pack__`, `__micro_batch__` and `__pieces__` (first and last piece if a long
    document was cut, else 0 and -1) say where the plan puts it. `__state__` continues with the step after it.
    Further stages follow with `.compose(...)`. In a DataLoader, each worker gets whole packs. Samples that cannot be
    read are left out and logged. Raises as `Plan.steps` does.
    """
    import webdataset

    return webdataset.DataPipeline(_Planned(RankPlan(plan, rank, world_size, micro_batch_size, state, 0, stop_step)))


class _Planned:
    """The first stage; called for each pass."""

    def __init__(self, ranked: RankPlan) -> None:
        self._ranked = ranked

    def __call__(self) -> Iterator[dict[str, Any]]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        turn = 0
        for step in self._ranked:
            for number, packs in enumerate(step.micro_batches):
                for pack in packs:
                    if turn % workers == mine:
                        place = {"__step__": step.step, "__micro_batch__": number, "__pack__": pack.number}
                        yield from (sample | {"__state__": step.state} for sample in self._samples(pack.units, place))
                    turn += 1

    def _samples(self, units: Any, place: dict[str, Any]) -> Iterator[dict[str, Any]]:
        sources = self._ranked.plan.sources
        for number, source in enumerate(sources):
            source.expect([unit.sample for unit in units if unit.source == number])
        for unit in units:
            source = sources[unit.source]
            where = source.locate(unit.sample)
            key, shard = where.key, where.shard
            try:
                content, images = canonical(source, unit.sample)
            except BadSample as error:
                _LOG.warning("sample %r of source %r in %s: %s", key, source.name, shard.shard, error.detail)
                continue
            sample = {"__key__": key, "__url__": shard.shard, "__source__": source.name, **place}
            sample |= {"__pieces__": (unit.first, unit.last), "json": json.dumps(content, ensure_ascii=False).encode()}
            yield sample | images
