"""Sources of many shards: one catalogue, few mappings, and the same plan as from the indexes of the shards themselves."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from m4train.config import MixtureConfig, SourceConfig
from m4train.data.index import build, catalogue
from m4train.data.plan.plan import Plan
from m4train.data.plan.sample_order import SampleOrder
from m4train.data.source import Source, build_sources, source_stats
from m4train.errors import StaleIndexError
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.fixture
def few(monkeypatch):
    """Sources of more than two shards have a catalogue."""
    monkeypatch.setattr(build, "most_mapped", lambda: 2)
    monkeypatch.setattr(catalogue, "most_mapped", lambda: 2)


def opened(pattern: Path, form: str = "canonical", **changes) -> Source:
    data = data_config(**changes)
    [built] = build_sources({"s": SourceConfig(path=str(pattern), format=form)}, data, FakeProcessor())
    return built


def tars(folder: Path) -> Path:
    samples = list(documents(23))
    samples.insert(7, ("bad", {"items": [{"text": "x"}]}, {}))
    write_shards(folder, samples, max_samples=3)
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes().replace(b'"items"', b'"itemz"'))
    (folder / "shard-000099.tar").write_bytes(bytes(10240))
    return folder / "*.tar"


def parquets(folder: Path) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    for number in range(7):
        rows = [{"messages": TURNS, "topic": "x"}] * (number + 1)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{number}.parquet", row_group_size=2)
    return folder / "*.parquet"


def steps(built: Source, **changes) -> list:
    found = zip(Plan([built], data_config(shuffle_window=2, **changes), 3, 2).steps(), range(12))
    return [([pack.units for pack in step.packs], step.dropped, step.state) for step, _ in found]


@pytest.mark.parametrize(("write", "form"), [(tars, "canonical"), (parquets, "parquet")])
def test_a_catalogue_tells_what_the_indexes_tell(tmp_path: Path, monkeypatch, caplog, write, form: str) -> None:
    pattern = write(tmp_path)
    direct = opened(pattern, form)
    said = [record.getMessage() for record in caplog.records]
    expected = steps(direct)
    monkeypatch.setattr(build, "most_mapped", lambda: 2)
    monkeypatch.setattr(catalogue, "most_mapped", lambda: 2)
    for _ in range(2):  # made, and read
        caplog.clear()
        built = opened(pattern, form)
        assert [record.getMessage() for record in caplog.records] == said
        assert built.index.shards.catalogue is not None
        for index in (built.index, pickle.loads(pickle.dumps(built.index))):
            assert len(index) == len(direct.index)
            assert index.digest() == direct.index.digest()
            assert (index.bad_count, index.unread) == (direct.index.bad_count, direct.index.unread)
            assert index.images_total == direct.index.images_total
            assert index.lengths.tolist() == direct.index.lengths.tolist()
            ends, other = index.block_ends(), direct.index.block_ends()
            assert ends is other is None or ends.tolist() == other.tolist()
            for sample in range(len(index)):
                assert index.size(sample) == direct.index.size(sample)
                assert index.image_count(sample) == direct.index.image_count(sample)
                assert index.locate(sample)[1] == direct.index.locate(sample)[1]
                assert index.locate(sample)[0].shard == direct.index.locate(sample)[0].shard
        assert len(pickle.dumps(built.index)) < 2000
        assert steps(built) == expected
        assert source_stats(built) == source_stats(direct)
    images = MixtureConfig(by="images")
    if form == "canonical":
        assert steps(built, mixture=images) == steps(direct, mixture=images)


CHANGES = {
    "a shard": lambda folder: write_shards(folder, documents(2), prefix="shard-000004x"),
    "its samples": lambda folder: os.replace(folder / "shard-000000.tar", folder / "shard-000001.tar"),
    "an index": lambda folder: (folder / "shard-000003.tar.index").unlink(),
    "token counts": lambda folder: next(folder.glob("shard-000003.tar.*.tokens")).unlink(),
    "the catalogue": lambda folder: next(folder.glob(".*.catalogue")).write_bytes(b"cut"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_catalogue_is_made_again_when_something_has_changed(tmp_path: Path, few, monkeypatch, change: str) -> None:
    pattern = tars(tmp_path)
    before = opened(pattern)
    monkeypatch.setattr(build, "_renew", lambda *_: pytest.fail("looked at every shard"))
    assert opened(pattern).index.digest() == before.index.digest()
    monkeypatch.undo()
    monkeypatch.setattr(build, "most_mapped", lambda: 2)
    monkeypatch.setattr(catalogue, "most_mapped", lambda: 2)
    CHANGES[change](tmp_path)
    after = opened(pattern)
    assert len(after.index) == sum(len(shard) for shard in after.index.shards)
    assert [after.key(n) for n in range(len(after))] == [
        shard.key(n) for shard in after.index.shards for n in range(len(shard))
    ]
    assert (after.index.digest() == before.index.digest()) == (change in ("an index", "token counts", "the catalogue"))


def test_pictures_next_to_many_files_of_records_are_looked_at(tmp_path: Path, few) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(next(documents(1))[2]["0.png"])
        record = {"image": f"{number}.png", "messages": [{"role": "user", "content": "<image>Q"}, TURNS[1]]}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record))
    assert not opened(tmp_path / "*.jsonl", "json").index.bad_count
    (tmp_path / "2.png").unlink()
    assert opened(tmp_path / "*.jsonl", "json").index.bad_count == 1


def test_where_nothing_can_be_written_every_process_makes_its_own(tmp_path: Path, few, monkeypatch, caplog) -> None:
    pattern = tars(tmp_path)
    monkeypatch.setattr(build, "kept", lambda path, found, now: catalogue.kept(Path("/proc/none/x"), found, now))
    built = opened(pattern)
    assert "every process reads the indexes" in caplog.text
    again = pickle.loads(pickle.dumps(built.index))
    assert again.digest() == built.index.digest()
    assert not list(tmp_path.glob(".*.catalogue"))


def test_large_sources_are_still_not_indexed_by_a_run(tmp_path: Path, few) -> None:
    pattern = tars(tmp_path)
    with pytest.raises(StaleIndexError, match="m4train data index"):
        opened(pattern, auto_index_limit=3)


_UNDER_64 = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from m4train.config import SourceConfig
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from tests.helpers.data import FakeProcessor, data_config
data = data_config()
sources = build_sources({"s": SourceConfig(path=sys.argv[1])}, data, FakeProcessor())
collator = Collator(sources, FakeProcessor(), data, 0)
for step, _ in zip(Plan(sources, data, 0, 8).steps(), range(40)):
    collator.batch(step.packs, step.step)
maps = sum(".tokens" in line or ".index" in line for line in open("/proc/self/maps"))
print(len(sources[0].index.shards), maps, len(os.listdir("/proc/self/fd")))
"""


def test_hundreds_of_shards_need_few_descriptors(tmp_path: Path) -> None:
    samples = list(documents(25))
    for number in range(300):
        key, content, images = samples[number % 25]
        write_shards(tmp_path, [(key, content, images)], prefix=f"{number:03d}")
    for _ in range(2):  # indexing, and with everything there
        found = subprocess.run(
            [sys.executable, "-c", _UNDER_64, str(tmp_path / "*.tar")], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr[-2000:]
        shards, maps, descriptors = map(int, found.stdout.split())
        assert shards == 300
        assert maps <= 4
        assert descriptors < 40


def test_the_order_of_row_groups_costs_no_more_for_more_of_them(tmp_path: Path) -> None:
    class Blocks:
        name, index = "s", None
        config = SourceConfig()

        def __init__(self, blocks: int) -> None:
            self._ends = np.arange(1, blocks + 1) * 4

        def __len__(self) -> int:
            return int(self._ends[-1])

        def block_ends(self) -> np.ndarray:
            return self._ends

    def seconds(blocks: int) -> float:
        order = SampleOrder(Blocks(blocks), 0, data_config(shuffle_window=8), 0)
        order._sample(0, 0)  # made once an epoch
        begun = time.perf_counter()
        drawn = [order._sample(0, position) for position in range(4000)]
        assert len(set(drawn)) == 4000
        return time.perf_counter() - begun

    # A hundred times as many: a cost in proportion would be a hundred times as much.
    assert min(seconds(300_000) for _ in range(3)) < 20 * min(seconds(3000) for _ in range(3)) + 0.02
