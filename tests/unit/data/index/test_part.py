"""data.holdout: who is held out, that nobody is in both parts, and that everything agrees with the whole."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m4train.config import SourceConfig
from m4train.config.compose import load_config
from m4train.config.holdout import hold_out
from m4train.data.index.part import PartIndex, held_out
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.errors import ConfigError
from tests.helpers.data import FakeProcessor, conversations, data_config, documents, write_shards

SHARE = 0.3


def _both(folder, **changes):
    data = data_config(sources={"a": SourceConfig(path=str(folder / "*.tar"))}, holdout=SHARE, **changes)
    hold_out(data)
    processor = FakeProcessor()
    (trained,) = build_sources(data.sources, data, processor)
    (held,) = build_sources(data.validation, data, processor)
    return trained, held, data


@pytest.mark.parametrize("samples", [documents, conversations])
def test_every_sample_is_in_one_part_by_its_key(tmp_path, samples):
    write_shards(tmp_path, samples(60), max_samples=7)
    trained, held, _ = _both(tmp_path)
    first, second = ({source.key(i) for i in range(len(source))} for source in (trained, held))
    assert len(first) + len(second) == 60
    assert not first & second
    assert 0.1 < len(second) / 60 < 0.5


def test_samples_that_join_later_move_none_of_the_others(tmp_path):
    write_shards(tmp_path, documents(40), max_samples=7)
    trained, held, _ = _both(tmp_path)
    before = [{source.key(i) for i in range(len(source))} for source in (trained, held)]
    for path in tmp_path.iterdir():
        path.unlink()
    write_shards(tmp_path, documents(60), max_samples=7)
    trained, held, _ = _both(tmp_path)
    after = [{source.key(i) for i in range(len(source))} for source in (trained, held)]
    assert before[0] <= after[0]
    assert before[1] <= after[1]


@pytest.mark.parametrize("form", ["json", "parquet", "auto"])
def test_records_that_have_no_key_stay_where_they_were_wherever_others_join(tmp_path, form):
    def split(numbers):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.{'jsonl' if form == 'auto' else form}"
        talks = [
            [{"role": "user", "content": f"Which? {n}"}, {"role": "assistant", "content": f"{n}"}] for n in numbers
        ]
        if form != "parquet":
            path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
        else:
            pq.write_table(pa.table({"messages": talks}), path, row_group_size=7)
        data = data_config(sources={"a": SourceConfig(path=str(path), format=form)}, holdout=SHARE)
        hold_out(data)
        both = [build_sources(part, data, FakeProcessor())[0] for part in (data.sources, data.validation)]
        said = [{s.read(i).messages[1]["content"][0]["text"] for i in range(len(s))} for s in both]
        assert not said[0] & said[1]
        assert len(said[0] | said[1]) == len(numbers)
        return said

    few, many = split(range(40)), split([*range(100, 120), *reversed(range(40)), *range(200, 210)])
    assert few[0] <= many[0]
    assert few[1] <= many[1]
    assert 4 < len(few[1]) < 24


def test_a_part_says_of_its_samples_what_the_whole_does(tmp_path):
    write_shards(tmp_path, documents(60), max_samples=7)
    trained, held, _ = _both(tmp_path)
    for source in (trained, held):
        index = source.index
        assert isinstance(index, PartIndex)
        shards = [index.locate(i) for i in range(len(source))]
        assert index.lengths.tolist() == [int(shard.lengths[n]) for shard, n in shards]
        assert index.frames.tolist() == [int(shard.frames[n]) for shard, n in shards]
        assert index.images_total == sum(shard.image_count(n) for shard, n in shards)
        assert [index.size(i)[0] for i in range(len(source))] == index.lengths.tolist()
        ends, numbers = index.ends, [index.shard_number(i) for i in range(len(source))]
        assert numbers == [int(np.searchsorted(ends, i, side="right")) for i in range(len(source))]
        assert index.bad_count == 0
        with pytest.raises(IndexError):
            index.locate(len(source))
    assert trained.index.digest() != held.index.digest()


def test_an_epoch_of_the_plan_sees_every_sample_that_is_not_held_out_and_no_other(tmp_path):
    write_shards(tmp_path, documents(60), max_samples=7)
    trained, _held, data = _both(tmp_path, epochs=1, long_documents="drop", max_dropped_fraction=1.0)
    plan = Plan([trained], data, 0, 2)
    seen = [unit.sample for step in plan.steps() for pack in step.packs for unit in pack.units]
    usable = [i for i in range(len(trained)) if trained.index.size(i)[0] <= data.sequence_length]
    assert sorted(set(seen)) == usable


def test_the_share_is_that_of_many_keys(tmp_path):
    write_shards(tmp_path, documents(300), max_samples=300)
    trained, held, _data = _both(tmp_path)
    assert len(held) / 300 == pytest.approx(SHARE, abs=0.08)
    assert held_out(trained.index._whole, 0.0).sum() == 0
    assert held_out(trained.index._whole, 1.0).all()


def test_a_share_that_holds_out_nothing_is_refused(tmp_path):
    write_shards(tmp_path, documents(5))
    data = data_config(sources={"a": SourceConfig(path=str(tmp_path / "*.tar"))}, holdout=1e-6)
    hold_out(data)
    with pytest.raises(ConfigError, match="holds out none of the 5 samples of data source 'a'"):
        build_sources(data.sources, data, FakeProcessor())


def test_a_configuration_gets_held_out_sources_that_train_nothing(tmp_path):
    given = [
        "data=own",
        "data.sources={a: {path: x.tar, weight: 3.0, loss_weight: 2.0, epochs: 2}}",
        "data.holdout=0.1",
    ]
    config = load_config([*given, "trainer.eval_every=5", "model.tokenizer=x"])
    held = config.data.validation["a"]
    assert (held.path, held.held_out) == ("x.tar", True)
    assert (held.weight, held.loss_weight, held.epochs) == (1.0, 1.0, None)
    assert not config.data.sources["a"].held_out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.holdout=1"], "data.holdout is 1.0: give a share from 0 to below 1"),
        (["data.holdout=0.1", "data.sources.a.stream=true"], "needs an index, but data.sources.a.stream is true"),
        (["data.sources.a.held_out=true"], "data.sources.a.held_out is true, but sources train"),
        (["data.validation={b: {path: y.tar, held_out: true}}"], "held_out is true, but data.holdout is 0"),
    ],
)
def test_what_cannot_be_held_out_is_one_sentence(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(["data=own", "data.sources={a: {path: x.tar}}", "model.tokenizer=x", *given])
