"""data.holdout: who is held out, that nobody is in both parts, and that everything agrees with the whole."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from m4train.config import SourceConfig
from m4train.config.compose import load_config
from m4train.config.holdout import hold_out
from m4train.data.index.part import PartIndex, draws
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


def _records(folder):
    for number in range(40):
        Image.new("RGB", (9 + number, 8), (number, 0, 0)).save(folder / f"{number}.png")
    turns = [("human", "<image>\nWhich, é?"), ("gpt", "That.")]  # all say the same of another picture
    talk = [{"from": role, "value": said} for role, said in turns]
    return [{"id": str(n), "image": f"{n}.png", "conversations": talk} for n in range(40)]


def _messages(record):
    asked = [{"type": "image", "image": record["image"]}, {"type": "text", "text": "Which, é?"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "That."}]}


WRITTEN = {  # how else the same records may be written down
    "escaped.json": lambda records, _: json.dumps(records),
    "printed.json": lambda records, _: json.dumps(records, indent=2, ensure_ascii=False),
    "lines.jsonl": lambda records, _: "\n".join(json.dumps(each, separators=(",", ":")) for each in records),
    "sorted.json": lambda records, _: json.dumps(records[::-1], sort_keys=True),
    "scored.json": lambda records, _: json.dumps([each | {"id": f"x{each['id']}", "score": 1} for each in records]),
    "moved.json": lambda records, to: json.dumps([each | {"image": str(to / each["image"])} for each in records]),
    "messages.json": lambda records, _: json.dumps([_messages(each) for each in records]),
    "table.csv": lambda records, _: (
        "image,question,answer\n" + "".join(f'{e["image"]},"Which, é?",That.\n' for e in records)
    ),
    "rows.parquet": None,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_records_stay_where_they_were_however_their_file_is_written(tmp_path, name):
    records = _records(tmp_path)

    def held(path):
        data = data_config(sources={"a": SourceConfig(path=str(path), format="auto")}, holdout=SHARE)
        hold_out(data)
        (source,) = build_sources(data.validation, data, FakeProcessor())
        return sorted(source.images(i)[0].width for i in range(len(source)))

    (tmp_path / "first.json").write_text(json.dumps(records, ensure_ascii=False))
    if name == "rows.parquet":
        pictures = [{"bytes": (tmp_path / each["image"]).read_bytes(), "path": "x"} for each in records]
        rows = [each | {"image": picture} for each, picture in zip(records, pictures)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=7)
    else:
        (tmp_path / name).write_text(WRITTEN[name](records, tmp_path))
    assert 4 < len(held(tmp_path / "first.json")) < 24
    assert held(tmp_path / name) == held(tmp_path / "first.json")


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
    drawn = draws(trained.index._whole)
    assert (drawn >= 0).all()
    assert (drawn < 1).all()


@pytest.mark.parametrize(("samples", "share"), [(1, 0.5), (2, 1e-6), (5, 1e-6), (5, 1 - 1e-9)])
def test_a_share_that_divides_nothing_is_refused_with_one_that_does(tmp_path, samples, share):
    write_shards(tmp_path, documents(samples))
    data = data_config(sources={"a": SourceConfig(path=str(tmp_path / "*.tar"))}, holdout=share)
    hold_out(data)
    said = f"holds out (all|none) of the {samples} usable samples of data source 'a': "
    with pytest.raises(ConfigError, match=said) as refused:
        build_sources(data.sources, data, FakeProcessor())
    other = re.search(r"data\.holdout=([\d.]+) holds out 1;", str(refused.value))
    assert (other is None) == (samples == 1)
    if other is not None:
        data.holdout = float(other[1])
        assert len(build_sources(data.validation, data, FakeProcessor())[0]) == 1
    measured = SourceConfig(path=str(tmp_path / "*.tar"))  # what it says instead
    apart = data_config(sources=data.sources, validation={"a": measured}, holdout=share)
    hold_out(apart)
    assert len(build_sources(apart.sources, apart, FakeProcessor())[0]) == samples


def test_a_share_that_only_divides_bad_samples_is_refused(tmp_path):
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": talk}, *[{"messages": "?"}] * 9]))
    data = data_config(sources={"a": SourceConfig(path=str(tmp_path / "a.json"), format="json")}, holdout=SHARE)
    hold_out(data)
    with pytest.raises(ConfigError, match="of the 1 usable samples of data source 'a'"):
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
