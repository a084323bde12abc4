from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m4train.config import SourceConfig
from m4train.data.plan import Plan
from m4train.data.planner import RankPlan
from m4train.data.source import Source, build_sources
from m4train.data.sources.parquet import ParquetRows
from m4train.data.stream import SampleStream
from m4train.inspection.plan_report import plan_report, plan_tables
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards
from tests.helpers.stores import http_store


@pytest.fixture
def rows(tmp_path: Path) -> Source:
    """60 rows in groups of 10."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = [{"texts": [{"user": "Number?", "assistant": str(number)}], "images": []} for number in range(60)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=10)
    config = {"rows": SourceConfig(path=str(tmp_path / "a.parquet"), format="parquet")}
    return build_sources(config, data_config(), FakeProcessor())[0]


def report(source: Source, ranks: int, **changes):
    data = data_config(epochs=1, sequence_length=64, packing_pool=1, **changes)
    return plan_report(Plan([source], data, 0, 8), 100, ranks, 1)


def test_the_prediction_is_what_one_reader_reads(rows: Source) -> None:
    data = data_config(epochs=1, sequence_length=64, packing_pool=1, shuffle_window=6)
    predicted = report(rows, 1, shuffle_window=6).sources[0].read_amplification
    rows = replace(rows, shard_format=ParquetRows())  # with nothing kept of what indexing read
    steps = RankPlan(Plan([rows], data, 0, 8), 0, 1, 1, None, 0, None)
    packs = [pack for step in steps for group in step.micro_batches for pack in group]
    used = [unit for pack in packs for unit in pack.units]
    for unit in used:
        rows.read(unit.sample)
    assert predicted == pytest.approx(rows.shard_format.groups_read * 10 / len(used))
    assert 1.2 < predicted < 8


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
    orders = [[SampleStream(s, 0, data, 0)._sample(0, place) for place in range(30)] for s in (remote, local)]
    assert [sorted(order) for order in orders] == [list(range(30))] * 2
    windows = np.array(orders[0]).reshape(3, 10) // 5
    assert all(len(set(window)) == 2 for window in windows.tolist())
    assert max(len(set(window)) for window in (np.array(orders[1]).reshape(3, 10) // 5).tolist()) > 2
    assert Plan([remote], data, 0, 1).fingerprint() != Plan([local], data, 0, 1).fingerprint()
