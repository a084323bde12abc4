"""Samples longer than a pack: what is kept of them, what is left out, and that every view of a run counts the same."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m4train import build
from m4train.commands import data as data_commands
from m4train.commands import inspect as inspect_run
from m4train.config import Config, DataConfig, ModelConfig, SourceConfig
from m4train.data.documents.boundaries import Boundaries
from m4train.data.documents.image_layout import FRAMES
from m4train.data.documents.pieces import PIECE_KINDS, Pieces
from m4train.data.documents.splitting import divide
from m4train.data.loading.collate import Collator
from m4train.data.loading.quarantine import Quarantine, QuarantineEntry, left_out_at_end
from m4train.data.plan.left_out import check_left_out, left_out, left_out_lines
from m4train.data.plan.plan import Plan
from m4train.data.source import Source, build_sources
from m4train.errors import ConfigError, DataError
from m4train.inspection.plan_report import plan_report
from m4train.inspection.validate import validate_source
from m4train.processing.pieces import TextPiece
from tests.helpers.data import FakeProcessor, conversation, data_config, digit_pictures, document, png, write_shards

SENTENCES = "".join(f"Sentence number {number} is here. " for number in range(40))
PARAGRAPHS = "\n\n".join(f"Paragraph {number}. It has two sentences." for number in range(30))
UNBROKEN = "x" * 1000


def source(folder: Path, samples: list, **settings) -> tuple[Source, DataConfig]:
    write_shards(folder, samples)
    data = data_config(**({"epochs": 1, "shuffle": False} | settings))
    [built] = build_sources({"s": SourceConfig(path=str(folder / "*.tar"))}, data, FakeProcessor())
    return built, data


def texts(built: Source, data: DataConfig) -> list[list[str]]:
    """What each planned segment says, by sample; every length is the planned one, or building it raises."""
    collator, found = Collator([built], FakeProcessor(), data, 0), {}
    for step in Plan([built], data, 0, 1).steps():
        for pack in step.packs:
            assert pack.tokens <= data.sequence_length
            assert pack.frames <= data.images_per_pack
            for unit in pack.units:
                document = collator.document(unit, pack.number)
                assert len(document.rendered.ids) == unit.tokens
                said = FakeProcessor().decode(document.rendered.ids)
                found.setdefault(unit.sample, []).append(((unit.first, unit.last), said))
    return [[said for _, said in sorted(parts)] for _, parts in sorted(found.items())]


@pytest.mark.parametrize("text", [SENTENCES, PARAGRAPHS, UNBROKEN, "ü" * 700, SENTENCES + PARAGRAPHS])
@pytest.mark.parametrize("length", [200, 333])
def test_a_text_longer_than_a_pack_is_cut_and_no_word_of_it_lost(tmp_path: Path, text: str, length: int) -> None:
    built, data = source(tmp_path, [("a", {"items": [{"text": text}]}, {})], sequence_length=length)
    collator = Collator([built], FakeProcessor(), data, 0)
    ids = [
        collator.document(unit, 0).rendered.ids
        for step in Plan([built], data, 0, 1).steps() for pack in step.packs for unit in sorted(pack.units)
    ]  # fmt: skip
    joined = np.concatenate(ids)
    assert FakeProcessor().decode(joined) == text
    assert joined[0] == FakeProcessor.bos_id
    assert joined[-1] == FakeProcessor.eos_id
    assert max(map(len, ids)) <= length


@pytest.mark.parametrize(("text", "ends"), [(SENTENCES, "."), (PARAGRAPHS, "\n\n")])
def test_it_is_cut_after_a_paragraph_or_else_after_a_sentence(tmp_path: Path, text: str, ends: str) -> None:
    built, data = source(tmp_path, [("a", {"items": [{"text": text}]}, {})], sequence_length=200)
    [parts] = texts(built, data)
    assert len(parts) > 3
    assert all(part.endswith(ends) for part in parts[:-1])


def test_its_image_stays_with_what_follows(tmp_path: Path) -> None:
    _, _, images = document(0)
    items = [{"text": "Before. " * 20}, {"image": "0.png"}, {"text": SENTENCES}, {"text": "After."}]
    built, data = source(tmp_path, [("a", {"items": items}, {"0.png": images["0.png"]})], sequence_length=240)
    collator = Collator([built], FakeProcessor(), data, 0)
    segments = [
        collator.document(unit, 0).rendered
        for step in Plan([built], data, 0, 1).steps() for pack in step.packs for unit in sorted(pack.units)
    ]  # fmt: skip
    [pictured] = [segment for segment in segments if segment.frames]
    assert "Sentence number 0" in FakeProcessor().decode(pictured.ids)
    assert "".join(FakeProcessor().decode(segment.ids) for segment in segments) == "".join(
        item.get("text", "") for item in items
    )


def test_an_index_without_places_cuts_between_ids(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Boundaries, "places", lambda self, pieces: {})
    built, data = source(tmp_path, [("a", {"items": [{"text": SENTENCES}]}, {})], sequence_length=200)
    [parts] = texts(built, data)
    assert "".join(parts) == SENTENCES
    assert len(parts[1]) == 200


def talk(turns: int, images: dict[int, str] | None = None, length: int = 40) -> dict:
    messages = []
    for turn in range(turns):
        picture = [{"image": images[turn]}] if images and turn in images else []
        messages.append({"role": "user", "content": [*picture, {"text": f"Question {turn}?"}]})
        messages.append({"role": "assistant", "content": [{"text": f"Answer {turn} ".ljust(length, ".")}]})
    return {"messages": messages}


@pytest.mark.parametrize("kept", [True, False])
def test_a_long_conversation_loses_whole_turns_off_its_end(tmp_path: Path, monkeypatch, kept: bool) -> None:
    if not kept:  # as in an index that was made before places were kept
        monkeypatch.setattr(Boundaries, "places", lambda self, pieces: {})
    picture = png(digit_pictures()[0][0])
    samples = [
        ("a", talk(10), {}),
        ("b", talk(6, {0: "0.png", 4: "1.png"}), {"0.png": picture, "1.png": picture}),
        ("c", talk(2, length=400), {}),
        ("d", talk(1), {}),
    ]
    built, data = source(tmp_path, samples, sequence_length=200, long_conversations="truncate")
    long, pictured, short = texts(built, data)
    assert long == ["".join(f"Question {n}?" + f"Answer {n} ".ljust(40, ".") for n in range(3))]
    assert pictured == ["".join(f"Question {n}?" + f"Answer {n} ".ljust(40, ".") for n in range(3))]
    assert "Answer 0" in short[0]
    collator = Collator([built], FakeProcessor(), data, 0)
    units = [unit for step in Plan([built], data, 0, 1).steps() for pack in step.packs for unit in pack.units]
    images = {unit.sample: len(collator.document(unit, 0).rendered.frames) for unit in units}
    assert images == {0: 0, 1: 1, 3: 0}  # the picture of the turns that are kept is, the one of turn 4 went with it
    dropped = [d for step in Plan([built], data, 0, 1).steps() for d in step.dropped]
    assert [(d.sample, d.reason) for d in dropped] == [(2, "too_long")]
    [line] = left_out_lines([left_out(built, data)])
    assert "1 of 4 samples (25.0%) are left out as too long, 2 are cut to fit" in line


def test_turns_that_begin_with_an_image_are_told_from_answers_with_one() -> None:
    kinds = ["template", "user", "template", "assistant", "template", "image", "user", "template", "assistant"]
    pieces = Pieces(
        np.full(9, 10), np.array([PIECE_KINDS.index(kind) for kind in kinds]), np.array([0] * 5 + [1] + [0] * 3)
    )
    data = data_config(sequence_length=70, long_conversations="truncate")
    assert divide(pieces, {3: [20], 8: [20]}, data).ranges == [(0, 4)]
    assert divide(pieces, {8: [20]}, data).ranges == []  # all one answer
    assert divide(pieces, {}, data).ranges == []  # an older index does not know, and keeps nothing that may be half
    assert divide(pieces, {3: [20], 8: [20]}, replace(data, long_conversations="drop")).lost == [(0, 9)]


def test_every_view_counts_what_is_left_out_alike_and_training_stops_above_the_limit(tmp_path: Path) -> None:
    pictures, digits = digit_pictures()
    samples = [conversation(n, pictures[n], digits[n]) for n in range(8)] + [
        ("long0", talk(9), {}),
        ("long1", talk(9), {}),
    ]
    built, data = source(tmp_path, samples, sequence_length=160)
    found = left_out(built, data)
    assert (found.usable, found.long, found.lost, found.fraction) == (10, 2, 2, 0.2)
    steps = list(Plan([built], data, 0, 1).steps())
    assert sum(d.reason == "too_long" for step in steps for d in step.dropped) == 2
    assert validate_source(built, data, FakeProcessor(), 1).report()["left_out"] == 2
    report = plan_report(Plan([built], data, 0, 1), 100, 1, 1).sources[0]
    assert (report.left_out, report.left_out_share, report.dropped) == (2, 0.2, {"too_long": 2})
    with pytest.raises(ConfigError, match=r"s: 2 of 10 .*\(20\.0%\).* more than data\.max_dropped_fraction=0\.1"):
        check_left_out([found], data)
    check_left_out([found], replace(data, max_dropped_fraction=0.2))
    check_left_out([left_out(built, replace(data, long_conversations="truncate"))], data)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.25, 1.0])
def test_index_validate_plan_and_the_start_of_a_run_agree_that_it_stops(
    tmp_path: Path, monkeypatch, capsys, held_out: bool, share: float
) -> None:
    pictures, digits = digit_pictures()
    short = [conversation(n, pictures[n], digits[n]) for n in range(8)]
    write_shards(tmp_path / "short", short)
    write_shards(tmp_path / "long", [*short[:6], ("long0", talk(9), {}), ("long1", talk(9), {})])
    sources = {name: SourceConfig(path=str(tmp_path / name / "*.tar")) for name in ("short", "long")}
    data = data_config(
        sequence_length=160, epochs=1, max_dropped_fraction=share, sources={"own": sources["short" if held_out else "long"]},
        validation={"own": sources["long" if held_out else "short"]},
    )  # fmt: skip
    model = ModelConfig(architecture={"scale_factor": 2}, tokenizer="any")
    config = Config(data=data, model=model, run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(build, "prepared_processor", lambda _: FakeProcessor())
    monkeypatch.setattr(build, "build_layout", lambda *_: FRAMES)
    name, stops = "validation/own" if held_out else "own", share < 0.25
    said = f"Of data source {name}: 2 of 8 samples (25.0%) are left out as too long"
    asked = {
        "index": lambda: data_commands.index(config),
        "validate": lambda: inspect_run.validate(config, 1, as_json=False),
        "plan": lambda: inspect_run.plan(config, 1, as_json=False),
    }
    for command, ask in asked.items():
        returned = ask()
        shown = " ".join(capsys.readouterr().out.split())
        assert returned == (stops and command != "index"), command
        assert (said in shown, "would stop before training" in shown) == (stops, stops), command
        assert "2 of 8 samples (25.0%)" in shown or "2 (25.0%)" in shown, command
    for ask in (inspect_run.validate, inspect_run.plan):
        ask(config, 1, as_json=True)
        assert bool(json.loads(capsys.readouterr().out)["stops"]) == stops
    with pytest.raises(ConfigError, match=re.escape(said)) if stops else nullcontext():
        build.build_data(config, FakeProcessor(), 0, 1)
    assert f"left out: {name}: 2 of 8 samples (25.0%)" in capsys.readouterr().out


def test_a_stream_stops_when_it_has_left_out_too_much(tmp_path: Path) -> None:
    entries = [QuarantineEntry(1, -1, "s", str(n), "shard", "too_long", "") for n in range(60)]
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.02, 0.1)
    quarantine.used["s"] = 600
    quarantine.add(entries, 600)
    quarantine.used["s"] = 500
    with pytest.raises(DataError, match=r"60 of 560 samples of source 's' .*data\.max_dropped_fraction=0\.1"):
        quarantine.add([], 0)
    other = Counter({("s", "too_long"): 20}), Counter({"s": 60})
    said = "left out: s: 80 too_long (12.5%), next to 560 documents used"
    assert left_out_at_end([quarantine.counted, other]) == [said]  # of all ranks


ITEMS = st.lists(st.tuples(st.integers(1, 300), st.sampled_from(["document", "image"])), min_size=1, max_size=12)


@given(ITEMS, st.integers(40, 200), st.randoms(use_true_random=False))
def test_of_whatever_document_every_id_is_packed_once_within_the_budget(items, budget: int, random) -> None:
    items = [(min(size, budget // 3) if kind == "image" else size, kind) for size, kind in items]
    sizes = np.array([1] + [size for size, _ in items] + [1])
    kinds = np.array([PIECE_KINDS.index(k) for k in ("template", *(kind for _, kind in items), "document")])
    pieces = Pieces(sizes, kinds, (kinds == PIECE_KINDS.index("image")).astype(int))
    places = {
        n: sorted(random.sample(range(2, 2 * size), size // 9)) for n, size in enumerate(sizes.tolist()) if size > 20
    }
    data = data_config(sequence_length=budget, images_per_pack=100)
    division = divide(pieces, places, data)
    fragments = division.fragments or [(n, 0, size) for n, size in enumerate(sizes)]
    for number, size in enumerate(sizes):
        parts = [(begin, end) for piece, begin, end in fragments if piece == number]
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == size
    assert all(division.pieces.tokens[a:b].sum() <= budget for a, b in division.ranges)
    unpredicted = sum(1 for begin, end in zip([0, *(b for _, b in division.ranges)], [*(a for a, _ in division.ranges), len(fragments)])
                      for n in range(begin, end) if division.pieces.kinds[n] == PIECE_KINDS.index("document")
                      and division.pieces.tokens[n] > 1)  # fmt: skip
    assert not unpredicted  # only a single id without one before it may be left out


def test_places_in_a_text_are_behind_its_paragraphs_and_sentences() -> None:
    text = 'Version 3.14 of it. He said "No!" Then (again?) left.\n\n  A new one\nand a line. Yes'.ljust(80, "x")
    piece = TextPiece(FakeProcessor()._text(text), "document", 0)
    places = Boundaries(FakeProcessor()).places([piece])[0]
    data = text.encode()
    ends = [(data[: place // 2].decode(), place % 2) for place in places]
    assert [(said[-6:], paragraph) for said, paragraph in ends] == [
        ("of it.", 0), (' "No!"', 0), ("gain?)", 0), ("left.\n\n"[-6:], 1), ("ew one\n"[-6:], 1), (" line.", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_all_ranks_of_a_run_left_out_is_counted_once(tmp_path: Path, monkeypatch, world: int) -> None:
    pictures, digits = digit_pictures()
    talks = [conversation(n, pictures[n], digits[n]) for n in range(9)]
    unanswered = {"messages": [*talk(1)["messages"], {"role": "assistant", "content": [{"text": "x"}], "weight": 0}]}
    unanswered["messages"][1]["weight"] = 0
    write_shards(tmp_path / "a", [*talks, ("long0", talk(9), {}), ("long1", talk(9), {}), ("none", unanswered, {})])
    write_shards(tmp_path / "b", [*talks[:4], ("long2", talk(9), {})])
    sources = {name: SourceConfig(path=str(tmp_path / name / "*.tar"), epochs=1) for name in "ab"}
    data = data_config(sequence_length=160, sources=sources, max_dropped_fraction=0.5, max_bad_fraction=0.5)
    config = Config(data=data, model=ModelConfig(tokenizer="any"), run_dir=str(tmp_path / f"run{world}"))
    config.trainer.global_batch_size, config.trainer.micro_batch_size = 3, 1
    monkeypatch.setattr(build, "build_layout", lambda *_: FRAMES)
    ranks = [build.build_data(config, FakeProcessor(), rank, world) for rank in range(world)]
    for rank in ranks:
        assert list(rank.steps(None))
    assert sum(rank.quarantine.bad for rank in ranks) == 1
    for name, lost in {"a": (2, 9), "b": (1, 4)}.items():
        assert tuple(map(sum, zip(*(rank.quarantine.too_long(name) for rank in ranks)))) == lost
    assert left_out_at_end(rank.quarantine.counted for rank in ranks) == [
        "left out: a: 1 no_label (8.3%), next to 9 documents used",
        "left out: a: 2 too_long (16.7%), next to 9 documents used",
        "left out: b: 1 too_long (20.0%), next to 4 documents used",
    ]
