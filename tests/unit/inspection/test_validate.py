import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from m4train.commands import inspect as inspect_run
from m4train.config import Config, DataConfig, DocumentOptions, SourceConfig
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan
from m4train.data.source import Source, build_sources
from m4train.errors import ConfigError
from m4train.inspection.validate import class_end, expected_fill, validate_source, validation_tables
from tests.helpers.data import FakeProcessor, conversations, data_config, document, documents, write_shards

PROCESSOR = FakeProcessor()


def damaged_shards(folder: Path) -> None:
    """20 documents, of which 5 cannot be used, each for another reason, one is left out by choice and one is over-long."""
    samples = list(documents(18))
    images = samples[1][2]
    images["0.png"] = images["0.png"][:-60]  # only decoding finds it
    samples[3] = ("question", {"messages": [{"role": "user", "content": "What?"}]}, {})
    samples[5][1]["items"][0] = {"text": "x" * 300}
    samples[6] = ("plain", {"items": [{"text": "no picture"}]}, {})
    write_shards(folder, samples, max_samples=8)
    with tarfile.open(folder / "foreign.tar", "w") as tar:  # what the writer would refuse
        for key, item in (("nowhere", {"image": "9.png"}), ("number", {"text": 5})):
            content = json.dumps({"items": [{"text": "a"}, item]}).encode()
            member = tarfile.TarInfo(f"{key}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def pages(folder: Path, **changes) -> tuple[Source, DataConfig]:
    data = data_config(**changes)
    config = SourceConfig(path=str(folder / "*.tar"), documents=DocumentOptions(require_image=True))
    return build_sources({"pages": config}, data, PROCESSOR)[0], data


def flip_byte(source: Source, sample: int) -> None:
    """Changes a stored image after it was indexed."""
    shard, number = source.index.locate(sample)
    member = shard.members(number)[1]
    status = os.stat(shard.shard)
    with open(shard.shard, "r+b") as file:
        file.seek(member.offset + member.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0xFF]))
    os.utime(shard.shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_damaged_shards_are_counted_by_reason(tmp_path: Path) -> None:
    damaged_shards(tmp_path)
    source, data = pages(tmp_path)
    flip_byte(source, 10)
    found = validate_source(source, data, PROCESSOR, workers=1)
    report = found.report()
    assert report["samples"] == 20
    assert report["unreadable_images"] == 2  # cut short, and missing
    assert report["without_label"] == 1
    assert report["over_long"] == 1
    reasons = {"unreadable_image", "missing_image", "no_label", "bad_json", "damaged", "skipped"}
    assert report["problems"] == dict.fromkeys(reasons, 1)
    assert report["bad"] == 5
    assert report["bad_fraction"] == 0.25
    assert {example["reason"] for example in report["examples"]} == reasons - {"skipped"}
    assert sum(count for _, count in report["tokens"]) == sum(count for _, count in report["frames"]) == 14
    assert 0.5 < report["expected_fill"]["tokens"] <= 1
    assert len(validation_tables([found])) == 5


@pytest.mark.slow
def test_processes_find_what_one_does(tmp_path: Path) -> None:
    damaged_shards(tmp_path)
    source, data = pages(tmp_path)
    seen: list[int] = []
    many = validate_source(source, data, PROCESSOR, 2, seen.append)
    assert many.report() == validate_source(source, data, PROCESSOR, 1).report()
    assert seen[-1] == 20


def test_histograms_hold_every_sample_in_the_class_of_its_size(tmp_path: Path) -> None:
    assert [class_end(n) for n in (0, 1, 2, 3, 4, 5, 64, 65)] == [0, 1, 2, 4, 4, 8, 64, 128]
    write_shards(tmp_path, [document(number) for number in range(30)])
    source, data = pages(tmp_path)
    found = validate_source(source, data, PROCESSOR, 1)
    lengths = source.index.shards[0].lengths.tolist()
    assert found.tokens == {end: sum(end // 2 < n <= end for n in lengths) for end in found.tokens}
    assert sum(found.tokens.values()) == 30
    shard = source.index.shards[0]
    of_images = [n for s in range(30) for n, k in zip(*(shard.pieces(s).tokens, shard.pieces(s).kinds)) if k == 5]
    assert found.image_tokens.total() == len(of_images) == shard.images_total
    assert found.image_tokens[8] == sum(4 < n <= 8 for n in of_images)


def test_the_expected_fill_is_that_of_the_source_alone(tmp_path: Path) -> None:
    same = {"items": [{"text": "x" * 98}]}  # 100 tokens with bos and eos: two to a pack of 256
    write_shards(tmp_path, [(f"k{n}", same, {}) for n in range(64)])
    config = {"text": SourceConfig(path=str(tmp_path / "*.tar"))}
    data = data_config()
    [source] = build_sources(config, data, PROCESSOR)
    assert expected_fill(source, data) == (pytest.approx(200 / 256), 0.0)


def test_the_command_fails_above_the_threshold_and_names_the_source(tmp_path: Path, monkeypatch, capsys) -> None:
    damaged_shards(tmp_path / "pages")
    write_shards(tmp_path / "talks", conversations(10))
    sources = {name: SourceConfig(path=str(tmp_path / name / "*.tar")) for name in ("pages", "talks")}
    monkeypatch.setattr(inspect_run.build, "prepared_processor", lambda config: PROCESSOR)
    for limit, status, failed in ((0.5, 0, []), (0.1, 1, ["validation/pages"])):
        data = data_config(
            sources={"talks": sources["talks"]}, validation={"pages": sources["pages"]}, max_bad_fraction=limit
        )
        assert inspect_run.validate(Config(data=data), 1, True) == status
        report = json.loads(capsys.readouterr().out)
        assert report["failed"] == failed
        assert report["sources"]["talks"]["bad"] == 0
    assert inspect_run.validate(Config(data=data), 1, False) == 1
    assert "more bad samples than data.max_bad_fraction=0.1: validation/pages" in capsys.readouterr().out


def test_a_source_without_a_good_sample_is_reported_and_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    write_shards(tmp_path, documents(3))
    config = SourceConfig(path=str(tmp_path / "*.tar"), format="pairs", epochs=2)
    data = data_config(sources={"pages": config}, max_bad_fraction=1.0)
    monkeypatch.setattr(inspect_run.build, "prepared_processor", lambda config: PROCESSOR)
    assert inspect_run.validate(Config(data=data), 1, True) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == ["pages"]
    assert report["sources"]["pages"]["bad"] == report["sources"]["pages"]["samples"] == 3
    assert report["sources"]["pages"]["expected_fill"] == {"tokens": 0.0, "frames": 0.0}
    with pytest.raises(ConfigError, match=r"no usable sample of 3 as format pairs \(the first: "):
        build_sources(data.sources, data, PROCESSOR)


TALK = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Red."}]
RECORDS: list[dict] = [
    {"messages": TALK},
    {"messages": TALK, "thumbnail": "a.jpg"},
    {"messages": [TALK[0], {"role": "assistant", "content": " "}]},
    {"messages": [{"role": "user", "content": "<ImageHere>"}, TALK[1]]},
    {"messages": [TALK[0], TALK[1] | {"weight": 0}]},
    {"prompt": "Q", "completion": "A", "label": False},
    {"messages": TALK, "images": [None]},
    {"messages": TALK, "score": 1, "topic": "t"},
    {"messages": TALK, "score": 0},
    {"messages": TALK, "image": "https://a.org/b.png"},
    {"topic": "t"},
]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_validate_and_a_run_agree_on_every_count(tmp_path: Path, form: str) -> None:
    records = RECORDS if form == "json" else [row for row in RECORDS if "prompt" not in row and "images" not in row]
    records = [record | {"score": record.get("score", 1)} for record in records]
    if form == "json":
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "a.parquet"
        names = sorted({name for record in records for name in record})
        rows = [{name: record.get(name) for name in names} for record in records]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    config = SourceConfig(path=str(path), format=form, where="score > 0", epochs=1)
    data = data_config()
    [source] = build_sources({"s": config}, data, PROCESSOR)
    found = validate_source(source, data, PROCESSOR, workers=1)
    lost: Counter[str] = Counter()
    collator = Collator([source], PROCESSOR, data, 0)
    good = 0
    for step in Plan([source], data, 0, 1).steps():
        lost.update(dropped.reason for dropped in step.dropped)
        batch, bad = collator.batch(step.packs, step.step)
        lost.update(entry.reason for entry in bad)
        good += len(batch.documents)
    assert dict(lost) == dict(found.problems)
    assert good + lost.total() == len(records) == found.samples
    expected = {"unread_media", "empty_answer", "stray_placeholder", "no_label", "skipped", "remote_image", "bad_json"}
    assert set(lost) == expected | ({"not_preferred", "missing_image"} if form == "json" else set())
    assert found.not_read == f"topic (1 of {len(records)})"
