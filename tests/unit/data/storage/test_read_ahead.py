"""What is asked of an object store before its turn: when, how often, and what becomes of it if it fails or nobody wants it."""

import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from m4train.config import SourceConfig
from m4train.data.index.tombstones import TOMBSTONES
from m4train.data.loading.collate import Collator
from m4train.data.loading.loader import _READ_AHEAD, _SAMPLES_AHEAD, Loader
from m4train.data.plan.plan import Plan
from m4train.data.source import Source, build_sources
from m4train.data.storage.files import FileReader
from m4train.data.storage.read_ahead import ReadAhead, merged
from m4train.errors import DataError
from tests.helpers.data import FakeProcessor, data_config, document, documents, write_shards
from tests.helpers.stores import HttpStore

pytest.importorskip("aiohttp", reason="the extra m4train[remote] is not installed")
PROCESSOR = FakeProcessor()


def opened(path: str, tmp_path: Path) -> Source:
    data = data_config(index_dir=str(tmp_path / "index"))
    [source] = build_sources({"pages": SourceConfig(path=path, format="auto")}, data, PROCESSOR)
    return pickle.loads(pickle.dumps(source))  # as a worker has it


def parquet(folder: Path, groups: int, rows: int) -> None:
    """A file of documents in the form of OBELICS, with so many row groups."""
    made = []
    for number in range(groups * rows):
        _, sample, pictures = document(number)
        texts = [item.get("text") for item in sample["items"]]
        images = [{"bytes": pictures[item["image"]]} if "image" in item else None for item in sample["items"]]
        made.append({"texts": texts, "images": images})
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), folder / "a.parquet", row_group_size=rows)


def packs_of(source: Source, count: int, **changes):
    data = data_config(**changes)
    packs = [pack for _, step in zip(range(count), Plan([source], data, 0, 1).steps()) for pack in step.packs]
    return Collator([source], PROCESSOR, data, 0), packs


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.001)
    return true()


def test_what_comes_soon_is_asked_for_while_a_pack_is_built(store: HttpStore, tmp_path: Path) -> None:
    source = opened(f"{store.url}/*.tar", tmp_path)
    counts, hashes = [], []
    collator, packs = packs_of(source, 2)
    for pack in packs:
        store.asked.clear()
        hashes.append(collator.batch([pack], 1)[0].data_hash)
        counts.append(len(store.asked))
    collator, _ = packs_of(pickle.loads(pickle.dumps(source)), 0)
    store.asked.clear()
    came = []

    def begin(unit) -> None:  # the first pack has come, and this document of it is not built yet
        if not came:
            came.append(until(lambda: len(store.asked) == sum(counts)))

    first, _ = collator.batch(packs[:1], 1, begin, soon=packs[1:])
    second, _ = collator.batch(packs[1:], 1)
    assert came == [True]
    assert len(store.asked) == sum(counts)
    assert [first.data_hash, second.data_hash] == hashes


@pytest.mark.parametrize(
    ("form", "workers"), [("tar", 0), ("parquet", 0), pytest.param("tar", 2, marks=pytest.mark.full)]
)
def test_a_run_asks_for_nothing_twice_and_for_no_stamps(
    store: HttpStore, tmp_path: Path, form: str, workers: int
) -> None:
    """At most one request a sample of a tar; of parquet a footer and as many as there are row groups, in each worker."""
    if form == "parquet":
        parquet(tmp_path / "shards", groups=5, rows=6)
    source = opened(f"{store.url}/*.{form}", tmp_path)
    data = data_config(num_workers=workers, epochs=1, sequence_length=1024)
    store.asked.clear()
    store.ranges.clear()
    loader = Loader(Plan([source], data, 0, 2), PROCESSOR, data, seed=0, micro_batch_size=1)
    samples = sum(step.documents for step in loader)
    assert samples == 30
    asked = [each for each in store.asked if TOMBSTONES not in each]  # once a folder and process
    assert {each.split()[0] for each in asked} == {"GET"}
    if form == "tar":
        assert len(asked) <= samples
        assert len(set(store.ranges)) == len(store.ranges)
    else:
        assert len(asked) <= 5 + 2


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("tokens", [256, 1024])
def test_tasks_come_once_with_what_the_same_worker_builds_later(
    store: HttpStore, tmp_path: Path, workers: int, tokens: int
) -> None:
    """Early enough: two micro-batches before, and as many as hold sixteen samples, however small packs are."""
    source = opened(f"{store.url}/*.tar", tmp_path)
    data = data_config(num_workers=0, epochs=2, sequence_length=tokens)
    loader = Loader(Plan([source], data, 0, 2), PROCESSOR, data, seed=0, micro_batch_size=1)
    loader.data = data_config(num_workers=workers)  # of which the tasks alone are looked at
    tasks = list(loader._handed_out()) if not workers else handed_out(loader, data)
    own = max(1, workers)
    ahead = max(_READ_AHEAD, -(-_SAMPLES_AHEAD // len(tasks[0].packs[0].units)))
    assert ahead > _READ_AHEAD or tokens > 256
    assert len(tasks) > own
    for first in range(own):
        mine = tasks[first::own]
        assert mine[0].soon == tuple(pack for task in mine[1 : ahead + 1] for pack in task.packs)
        assert [task.soon for task in mine[1:]] == [
            *(task.packs for task in mine[ahead + 1 :]),
            *[()] * min(ahead, len(mine) - 1),
        ]


def handed_out(loader: Loader, data) -> list:
    """The tasks of a loader with workers, planned in this process."""
    inline = Loader(loader.plan, PROCESSOR, data, seed=0, micro_batch_size=1)
    tasks = inline._tasks()
    loader._tasks = lambda: tasks
    return list(loader._handed_out())


def test_local_shards_are_not_read_ahead(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", documents(30), max_samples=10)
    source = opened(str(tmp_path / "shards" / "*.tar"), tmp_path)
    data = data_config(epochs=1)
    loader = Loader(Plan([source], data, 0, 2), PROCESSOR, data, seed=0, micro_batch_size=1)
    assert not any(task.soon for task in loader._handed_out())


def test_what_failed_before_its_turn_ends_the_run_in_its_turn(store: HttpStore, tmp_path: Path) -> None:
    source = opened(f"{store.url}/*.tar", tmp_path)
    collator, packs = packs_of(source, 2)
    collator.batch(packs[:1], 1)
    store.broken = True
    collator.sources[0].prefetch([unit.sample for unit in packs[1].units])
    [coming] = collator.sources[0].files._ahead._coming
    assert until(coming.future.done)
    store.broken = False
    with pytest.raises(DataError, match="failed 8 times"):
        collator.batch(packs[1:], 2)


def fetched(ranges) -> list[bytes]:
    return [bytes(size) for _, _, size in ranges]


def test_what_was_passed_over_is_given_up() -> None:
    ahead = ReadAhead()
    for start in (0, 10, 20, 30):
        ahead.begin([("s3://a", start, 10)], fetched)
    assert ahead.wants("s3://a", 10, 10)
    assert not ahead.wants("s3://a", 12, 8)
    assert [start for _, start, _ in ahead.take([("s3://a", 22, 2)])] == [20]
    assert [ahead.wants("s3://a", start, 10) for start in (0, 10, 20, 30)] == [False, False, False, True]
    assert ahead.take([("s3://b", 0, 1)]) == []


def test_what_two_want_is_fetched_once_and_held_for_the_second(store: HttpStore, tmp_path: Path) -> None:
    """As the text of a long document is, whose parts are in several packs."""
    path = f"{store.url}/shard-000000.tar"
    reader = FileReader()
    store.ranges.clear()
    text = (path, 0, 100)
    first, between, last = [text, (path, 200, 10)], [(path, 512, 10)], [text, (path, 1000, 10)]
    for wanted in (first, between, last):
        reader.prefetch(wanted)
    read = []
    for wanted in (first, between, last):
        reader.expect(wanted)
        read.append([reader.read(*part) for part in wanted])
    assert read[0][0] == read[2][0]
    assert len(store.ranges) == 3
    reader.expect(between)
    assert not reader.holds(text)


def test_ranges_near_each_other_are_one() -> None:
    assert merged([("b", 0, 5), ("a", 30, 10), ("a", 0, 10), ("a", 15, 5)], gap=5) == [
        ("a", 0, 20),
        ("a", 30, 10),
        ("b", 0, 5),
    ]
