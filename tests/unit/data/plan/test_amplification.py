import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m4train.config import DataConfig, SourceConfig
from m4train.data.loading.rank_plan import RankPlan
from m4train.data.plan.plan import Plan
from m4train.data.plan.sample_order import SampleOrder
from m4train.data.source import Source, build_sources
from m4train.inspection.plan_report import plan_report, plan_tables
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards
from tests.helpers.stores import http_store


def written(folder: Path, count: int, data: DataConfig, group: int) -> Source:
    """Conversations of different lengths in row groups of `group`."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    said = lambda number: "1" * (1 + number * 7 % 40)
    table = [{"texts": [{"user": "Number?", "assistant": said(number)}], "images": []} for number in range(count)]
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "a.parquet", row_group_size=group)
    config = {"rows": SourceConfig(path=str(folder / "a.parquet"), format="parquet")}
    return build_sources(config, data, FakeProcessor())[0]


@pytest.fixture
def rows(tmp_path: Path) -> Source:
    """60 rows in groups of 10."""
    return written(tmp_path, 60, data_config(), 10)


def report(source: Source, ranks: int, **changes):
    data = data_config(epochs=1, sequence_length=64, packing_pool=1, **changes)
    return plan_report(Plan([source], data, 0, 8), 100, ranks, 1)


def really_read(source: Source, data: DataConfig, group: int) -> float:
    """Rows read for each one used, by the workers of one rank, each with a reader of its own."""
    workers = max(1, data.num_workers)
    readers = [replace(source, shard_format=pickle.loads(pickle.dumps(source.shard_format))) for _ in range(workers)]
    used = turn = 0
    for step in RankPlan(Plan([source], data, 0, 8), 0, 1, 1, None, 0, None):
        for packs in step.micro_batches:
            for unit in (unit for pack in packs for unit in pack.units):
                readers[turn % workers].read(unit.sample)
                used += 1
            turn += 1
    return sum(reader.shard_format.groups_read for reader in readers) * group / used


@pytest.mark.parametrize("group", [5, 40])
def test_at_the_defaults_every_worker_reads_a_row_group_about_once_as_predicted(tmp_path: Path, group: int) -> None:
    data = DataConfig(epochs=1)
    source = written(tmp_path, 1600, data, group)
    predicted = plan_report(Plan([source], data, 0, 8), 1000, 1, 1).sources[0].read_amplification
    assert predicted == pytest.approx(really_read(source, data, group))
    assert predicted < 1.1 * data.num_workers  # each of them reads every row group


def test_many_readers_of_the_same_row_groups_are_pointed_to_conversion(rows: Source) -> None:
    few, many = report(rows, 1, shuffle_window=2), report(rows, 8, shuffle_window=6)
    assert many.sources[0].read_amplification > 2 > few.sources[0].read_amplification
    assert "m4train data convert" in plan_tables(many)[-1]
    assert len(plan_tables(few)) == 2


def test_shards_in_an_object_store_are_drawn_window_by_window(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", documents(30), max_samples=5)
    data = data_config(index_dir=str(tmp_path / "index"), shuffle_window=2)
    with http_store(tmp_path / "shards") as store:
        config = {"pages": SourceConfig(path=f"{store.url}/*.tar")}
        [remote] = build_sources(config, data, FakeProcessor())
    [local] = build_sources({"pages": SourceConfig(path=str(tmp_path / "shards" / "*.tar"))}, data, FakeProcessor())
    orders = [[SampleOrder(s, 0, data, 0)._sample(0, place) for place in range(30)] for s in (remote, local)]
    assert [sorted(order) for order in orders] == [list(range(30))] * 2
    windows = np.array(orders[0]).reshape(3, 10) // 5
    assert all(len(set(window)) == 2 for window in windows.tolist())
    assert max(len(set(window)) for window in (np.array(orders[1]).reshape(3, 10) // 5).tolist()) > 2
    assert Plan([remote], data, 0, 1).fingerprint() != Plan([local], data, 0, 1).fingerprint()
