"""Of random records in every format no byte of a medium disappears uncounted, and `validate` and a run count the same."""

import base64
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.loading.loader import validation_steps
from m4train.data.loading.shard_stream import streamed_sample
from m4train.data.source import open_sources
from m4train.data.sources.fields import Reading
from m4train.data.sources.registry import FORMATS
from m4train.errors import BadSample
from m4train.inspection.validate import validate_source
from tests.helpers.data import FakeProcessor, data_config, png
from tests.unit.data.sources.test_unread import _tar

RED = png(Image.new("RGB", (20, 10), "red"))
CODED = base64.b64encode(RED).decode()
PLAIN = ["a word", "seven words that say nothing of it", 3, 0.5, True, False, None, "", [], {}, ["x", 1], {"k": "v"}]
MEDIA = [
    "a.jpg",
    "s3://b/k.mp4",
    "data:image/png;base64,AAAA",
    CODED,
    ["x/y.webp"],
    {"u": ["clip.wav"]},
    {"file": "a.TIFF"},
]
NAMES = ["topic", "note", "k1", "Remark", "meta", "extra_7"]
MEDIA_NAMES = ["photo", "imageFile", "video_path", "screenshot", "audios"]
extra = st.tuples(st.sampled_from(NAMES), st.sampled_from(PLAIN + MEDIA)) | st.tuples(
    st.sampled_from(MEDIA_NAMES), st.sampled_from(["p7", ["p7"], {"at": "p7"}, "", None, [], False])
)
placed = st.lists(st.tuples(st.sampled_from(["record", "turn", "item", "nested"]), extra), max_size=3)
FILES = ["json", "array", "base64", "parquet", "llava_onevision", "pairs", "picture_folder"]


def _is_medium(name: str, value: Any) -> bool:
    return value in MEDIA or (name in MEDIA_NAMES and value not in ("", None, [], False))


def _is_filled(value: Any) -> bool:
    return value is False or value not in (None, "", [], {})


def made(extras: list[Any], with_picture: bool) -> tuple[dict[str, Any], set[str], bool]:
    """A record with these fields added, the paths of those that hold something, and whether one of them holds a medium."""
    item: dict[str, Any] = {"type": "text", "text": "Which?"}
    turn: dict[str, Any] = {"role": "user", "content": [item]}
    record: dict[str, Any] = {"conversations": [turn, {"role": "assistant", "content": "Red."}]}
    record |= {"image": "red.png"} if with_picture else {}
    nested: dict[str, Any] = {}
    places = {"record": (record, ""), "turn": (turn, "conversations[]."), "item": (item, "conversations[].content[].")}
    found: dict[str, Any] = {}
    for where, (name, value) in extras:
        if where == "nested":
            nested[name] = value
            continue
        place, path = places[where]
        place[name] = value
        found[path + name] = value
    if nested:
        record["around"] = nested
    media = any(_is_medium(path.rpartition(".")[2], value) for path, value in [*found.items(), *nested.items()])
    unread = {path for path, value in found.items() if _is_filled(value)}
    return (
        record,
        unread | ({"around"} if any(_is_filled(v) and v is not False for v in nested.values()) else set()),
        media,
    )


def written(folder: Path, form: str, records: list[dict[str, Any]]) -> tuple[str, str]:
    """The records in a format: its name and the path of its file."""
    (folder / "red.png").write_bytes(RED)
    if form == "array":
        (folder / "a.json").write_text(json.dumps(records, indent=1))
        return "json", str(folder / "a.json")
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        rows = [{name: _cell(value) for name, value in record.items()} for record in records]
        names = sorted({name for row in rows for name in row})
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=3)
        return "parquet", str(folder / "a.parquet")
    if form in ("json", "base64"):
        (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return "json", str(folder / "a.jsonl")
    if form == "picture_folder":
        (folder / "f").mkdir()
        for number, record in enumerate(records):
            (folder / "f" / f"{number}.png").write_bytes(RED)
            (folder / "f" / f"{number}.json").write_text(json.dumps(record | {"image": f"{number}.png"}))
        return form, str(folder / "f")
    members: dict[str, Any] = {}
    for number, record in enumerate(records):
        content = {name: value for name, value in record.items() if name != "image"}
        if form == "llava_onevision":
            content = {"texts": content.pop("conversations")} | content
        members |= {f"{number}.json": content, f"{number}.png": RED}
    return form, _tar(folder / "a.tar", members)


def _cell(value: Any) -> Any:
    """A value as a column of texts holds it."""
    if isinstance(value, str) or value in (None, [], {}) or value is False:
        return value or None
    return json.dumps(value)


@pytest.mark.parametrize("form", FILES)
@settings(max_examples=25)
@given(given_extras=st.lists(st.tuples(placed, st.booleans()), min_size=1, max_size=8))
def test_media_are_never_lost_and_counts_agree(form: str, given_extras: list[Any]) -> None:
    own = form in ("llava_onevision", "pairs", "picture_folder")  # each sample has its picture
    cases = [made(extras, own or picture) for extras, picture in [([], True), *given_extras]]
    records = [dict(record) for record, _, _ in cases]
    if form == "base64":
        records = [record | {"image": CODED} if "image" in record else record for record in records]
    with tempfile.TemporaryDirectory() as folder:
        kind, path = written(Path(folder), form, records)
        data = data_config(sources={"s": SourceConfig(path=path, format=kind)}, num_workers=0)
        [source] = open_sources(data.sources, data, FakeProcessor())
        bad = {source.key(n): source.index.shards[0].bad.get(n, ("",))[0] for n in range(len(source))}
        assert bad == {str(n): "unread_media" if media else "" for n, (_, _, media) in enumerate(cases)}
        expected: Counter[str] = Counter()
        for _, unread, media in cases:
            renamed = {p.replace("conversations[]", "texts[]") if form == "llava_onevision" else p for p in unread}
            expected.update(() if media else renamed)
        if form != "parquet":  # whose columns hold texts alone
            assert Counter(source.index.unread) == expected
        problems = Counter(reason for reason in bad.values() if reason)
        found = validate_source(source, data, FakeProcessor(), 1)
        assert found.problems == problems
        assert found.samples == len(records)
        steps = list(validation_steps([source], FakeProcessor(), data, micro_batch_size=1, rank=0, world_size=1))
        assert Counter(entry.reason for step in steps for entry in step.bad) == problems
        used = [d.key for step in steps for batch in step.micro_batches for d in batch.documents]
        assert sorted(used) == sorted(key for key, reason in bad.items() if not reason)
        if form in ("llava_onevision", "pairs"):
            _check_stream(form, records, bad)


def _check_stream(form: str, records: list[dict[str, Any]], bad: dict[str, str]) -> None:
    """The same samples, read from a stream, are bad for the same reasons."""
    for number, record in enumerate(records):
        content = {name: value for name, value in record.items() if name != "image"}
        if form == "llava_onevision":
            content = {"texts": content.pop("conversations")} | content
        stored = {"__key__": str(number), "__url__": "u", "json": json.dumps(content).encode(), "png": RED}
        reason = ""
        try:
            streamed_sample(FORMATS[form](Reading()), stored, set())  # type: ignore[arg-type]
        except BadSample as error:
            reason = error.reason
        assert reason == bad[str(number)]
