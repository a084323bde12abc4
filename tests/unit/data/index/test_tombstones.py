"""Samples that are taken down: no loader gives them from the next start on, and runs that were begun go on."""

import json
import os

import numpy as np
import pytest

from m4train.config import DataConfig, SourceConfig
from m4train.data.index import catalogue
from m4train.data.index.tombstones import TOMBSTONES, Tombstone, bury, taken_down
from m4train.data.loading.collate import Collator
from m4train.data.loading.shard_stream import ShardStream
from m4train.data.plan.plan import Plan
from m4train.data.shards import ShardWriter, expand_shards
from m4train.data.source import build_sources, open_sources, source_stats
from m4train.data.sources.tar import CanonicalTar
from m4train.errors import BadSample, DataError
from m4train.inspection.preview import view_pack
from m4train.inspection.replay import planned_step, replayed_samples
from m4train.inspection.validate import validate_source
from tests.helpers.data import FakeProcessor, document

COUNT = 24


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "shards", max_samples=8) as writer:
        for number in range(COUNT):
            writer.write(*document(number))
    return tmp_path / "shards"


def _source(folder, path=None, **data):
    config = SourceConfig(path=path or str(folder), format="canonical")
    (source,) = build_sources({"a": config}, DataConfig(sequence_length=400, epochs=1, **data), FakeProcessor())
    return source


def _take(folder, numbers):
    stones = [
        Tombstone(f"shard-{n // 8:06d}.tar", document(n)[0], f"url http://site/{n}", "2026-11-30") for n in numbers
    ]
    return bury(str(folder), stones)


def _plan(source, **data):
    return Plan([source], DataConfig(sequence_length=400, epochs=1, **data), seed=3, global_batch_size=2)


def _planned(steps):
    return [unit.sample for step in steps for pack in step.packs for unit in pack.units]


@pytest.mark.parametrize("many", [False, True])
def test_samples_that_are_taken_down_are_in_no_plan_no_count_and_cannot_be_read(folder, monkeypatch, many):
    if many:
        monkeypatch.setattr(catalogue, "most_mapped", lambda: 2)  # so that plans come from a catalogue
        monkeypatch.setattr("m4train.data.index.build.most_mapped", lambda: 2)
    before = _source(folder)
    digest, tokens = before.index.digest(), before.index.lengths.sum()
    assert before.index.taken_down() == ""
    assert _take(folder, [3, 9, 10]) == 3
    assert _take(folder, [9, 11]) == 1  # what is known is not said twice
    gone = {3, 9, 10, 11}
    source = _source(folder)
    assert (source.index.shards.catalogue is not None) == many
    assert len(source) == COUNT
    assert source.index.digest() == digest
    assert source.index.taken_down()
    assert source.index.bad_count == 4
    assert source.index.lengths.sum() < tokens
    assert {n for n in range(COUNT) if source.index.size(n) == (0, 0)} == gone
    for number in gone:
        with pytest.raises(BadSample, match=f"url http://site/{number}") as error:
            source.read(number)
        assert error.value.reason == "taken_down"
    steps = list(_plan(source).steps())
    assert sorted(set(_planned(steps))) == sorted(set(range(COUNT)) - gone)
    assert {d.sample for s in steps for d in s.dropped if d.reason == "taken_down"} == gone
    stats = source_stats(source)
    assert stats["bad"] == {"taken_down": 4}
    used = sum(source.index.image_count(number) for number in range(COUNT))
    assert stats["images"] == used == source.index.images_total < before.index.images_total


def test_every_start_says_how_much_is_taken_down_and_validation_takes_it_for_no_fault(folder, caplog):
    _take(folder, [3, 9])
    source = _source(folder)
    assert "shard-000000.tar: 1 of 8 samples are taken down" in caplog.text
    report = validate_source(source, DataConfig(sequence_length=400), FakeProcessor(), workers=1)
    assert report.problems["taken_down"] == 2
    assert report.bad == 0


@pytest.mark.parametrize("cut", [0, 2])
def test_a_run_that_was_begun_goes_on_without_them(folder, cut):
    before = _plan(_source(folder))
    steps = list(before.steps())
    state = json.loads(json.dumps(steps[cut].state))
    later = set(_planned(steps[cut + 1 :]))
    gone = sorted(later)[:3]
    _take(folder, gone)
    after = _plan(_source(folder))
    assert after.fingerprint() != before.fingerprint()
    assert after.content() == before.content()
    source = after.sources[0]
    readable, reasons = set(), set()
    for sample in set(_planned(after.steps(state))):
        try:
            source.read(sample)
            readable.add(sample)
        except BadSample as error:  # it was in a pack that was open when the state was saved
            reasons.add(error.reason)
    assert readable == later - set(gone)
    assert reasons <= {"taken_down"}


def test_a_replay_says_which_samples_of_a_step_are_taken_down_by_now(folder, tmp_path, caplog):
    before = _plan(_source(folder))
    steps = list(before.steps())
    state = tmp_path / "run" / "checkpoints" / "step-000001"
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"plan": steps[0].state}))
    shown = set(_planned(steps[1:2]))
    _take(folder, sorted(shown))
    source = _source(folder)
    assert "samples are taken down" in caplog.text  # as at every start
    collator = Collator([source], FakeProcessor(), DataConfig(sequence_length=400), 0)
    planned = planned_step(_plan(source), 2, tmp_path / "run")
    samples = replayed_samples(collator, [view_pack(collator, pack) for pack in planned.packs])
    gone = {document(number)[0] for number in shown}
    dropped = {sample.key for sample in samples if sample.dropped}
    assert dropped  # of packs that were open when the state was saved
    assert dropped == {sample.key for sample in samples} & gone
    assert all("taken_down" in sample.dropped for sample in samples if sample.dropped)


@pytest.mark.parametrize("prefix", ["", "file:", "pipe:cat "])
def test_streams_leave_them_out_but_for_commands_whose_folder_nobody_knows(folder, prefix):
    _take(folder, [3, 9])
    shards = [f"{prefix}{path}" for path in expand_shards(str(folder))]
    stream = ShardStream("a", shards, CanonicalTar(), "0", shuffle=False)
    keys = []
    for sample in stream:
        if sample.cycle:
            break
        keys.append(sample.key)
    gone = {document(3)[0], document(9)[0]}
    if prefix.startswith("pipe"):
        assert len(keys) == COUNT
        return
    assert set(keys) == {document(n)[0] for n in range(COUNT)} - gone
    assert {(entry.key, entry.reason) for entry in stream.bad} >= {(key, "taken_down") for key in gone}


def test_tombstones_are_read_from_object_stores_too():
    import fsspec

    store = fsspec.filesystem("memory")
    stone = {"shard": "a.tar", "key": "k", "why": "asked for", "date": "2026"}
    store.pipe("/taken/x/" + TOMBSTONES, json.dumps(stone).encode() + b"\n")
    assert taken_down("memory://taken/x/a.tar") == {"k": "asked for"}
    assert taken_down("memory://taken/x/b.tar") == {}
    assert taken_down("memory://nothing/x/a.tar") == {}


def test_the_file_is_no_shard_and_a_damaged_one_is_an_error(folder):
    _take(folder, [3])
    assert [os.path.basename(path) for path in expand_shards(str(folder))] == [f"shard-{n:06d}.tar" for n in range(3)]
    assert len(expand_shards(f"{folder}/*")) == 3
    with open(folder / TOMBSTONES, "a") as file:
        file.write('{"shard": "shard-000001.tar"}\n')
    with pytest.raises(DataError, match=r"Line 2 of .*taken-down.tombstones .* repair it"):
        _source(folder)


def test_other_formats_honour_them_as_well(tmp_path):
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]})
        for n in range(4)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    config = {"c": SourceConfig(path=str(tmp_path / "chat.jsonl"), format="json")}
    (source,) = open_sources(config, DataConfig(), FakeProcessor())
    bury(str(tmp_path), [Tombstone("chat.jsonl", source.key(2), "asked for", "2026")])
    (source,) = open_sources(config, DataConfig(), FakeProcessor())
    assert np.flatnonzero(source.index.lengths == 0).tolist() == [2]
