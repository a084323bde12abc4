"""No field of a record goes unread without a word, and none that holds a picture, a video or a sound at all."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4train import build
from m4train.commands import data as data_commands
from m4train.commands import inspect as inspect_run
from m4train.config import Config, ModelConfig, SourceConfig
from m4train.data.convert import canonical, convert
from m4train.data.documents.image_layout import FRAMES
from m4train.data.loading.collate import Collator
from m4train.data.loading.shard_stream import streamed_sample
from m4train.data.loading.stream_loader import StreamLoader
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources, open_sources, source_stats
from m4train.data.sources.base import SEVERAL_FRAMES
from m4train.data.sources.fields import Reading
from m4train.data.sources.media import speaks_of_media
from m4train.data.sources.records import compose
from m4train.data.sources.tar import CanonicalTar
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.images import frames_in
from tests.helpers.data import FakeProcessor, data_config, png

RED = png(Image.new("RGB", (20, 10), "red"))
TALK = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Red."}]
NAMES = [
    "photo",
    "picture",
    "img",
    "imgs",
    "image_path",
    "image_file",
    "image_url",
    "pic",
    "media",
    "videos",
    "video",
    "audios",
]
NAMES += [
    "imageFile",
    "frames",
    "screenshot",
    "thumbnailUrl",
    "pixel_values",
    "audio_path",
    "images_list",
    "photos",
    "IMAGE",
]
VALUES = [
    "a.jpg",
    "https://x.org/a.PNG?size=3",
    "s3://b/k/v.mp4",
    "data:image/png;base64,AAAA",
    base64.b64encode(RED).decode(),
]
VALUES += [
    b"\x89PNG",
    RED,
    {"bytes": RED, "path": None},
    ["x/y.webp"],
    [{"u": "clip.wav"}],
    json.dumps({"file": "a.tiff"}),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["record", "turn", "item", "nested"])
def test_a_field_whose_name_speaks_of_media_makes_the_sample_bad(name: str, where: str) -> None:
    _check_unread(name, "somewhere/42", where)


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("where", ["record", "turn", "item", "nested"])
def test_a_field_whose_value_is_a_medium_makes_the_sample_bad(value: Any, where: str) -> None:
    _check_unread("extra", value, where)


def _check_unread(name: str, value: Any, where: str) -> None:
    record = _with(name, value, where)
    with pytest.raises(BadSample) as error:
        compose(record, Reading()).unread()
    assert error.value.reason == "unread_media"
    assert (name if where != "nested" else "extras") in error.value.detail
    ignored = name if where != "nested" else "extras"
    for pattern in (ignored, f"*{ignored[1:]}"):
        assert compose(record, Reading.of(SourceConfig(ignore_fields=[pattern]))).unread() == ()


def _with(name: str, value: Any, where: str) -> dict:
    item = {"type": "text", "text": "Which?"}
    turn = {"role": "user", "content": [item]}
    record = {"messages": [turn, TALK[1]], "image": "a.png"}
    place = {"record": record, "turn": turn, "item": item, "nested": record.setdefault("extras", {})}[where]
    place[name] = value
    if where != "nested":
        del record["extras"]
    return record


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_id", 7), ("image_width", 640), ("num_images", 1), ("image_size", [640, 480]), ("image_caption", "A cat.")]
    + [
        ("image_correspondence_ratings", [5]),
        ("has_image", True),
        ("topic", "photo"),
        ("median", 3),
        ("note", "see photo.jpg there"),
    ],
)
def test_what_is_said_about_a_picture_is_counted_and_not_a_picture(name: str, value: Any) -> None:
    assert compose({"messages": TALK, "image": "a.png", name: value}, Reading()).unread() == (name,)


@pytest.mark.parametrize(
    ("name", "value"), [("image_id", 7), ("has_image", True), ("id", "train/1.jpg"), ("source", "a/b.png")]
)
def test_without_a_picture_its_number_or_name_may_be_all_there_is_of_it(name: str, value: Any) -> None:
    assert compose({"messages": TALK, "image": "a.png", name: value}, Reading()).unread() in ((), (name,))
    with pytest.raises(BadSample, match=name):
        compose({"messages": TALK, name: value}, Reading()).unread()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_correspondence_ratings", [5, 4]),
        ("image_correspondence_min", 5),
        ("image_caption", "A cat."),
        ("num_images", 0),
    ]
    + [("has_image", False), ("image_width", 0), ("file", "index.ts"), ("video_title", "A day")],
)
def test_without_a_picture_what_is_said_about_one_is_no_picture(name: str, value: Any) -> None:
    assert compose({"messages": TALK, name: value}, Reading()).unread() in ((), (name,))


def test_scores_and_where_a_sample_comes_from_are_known() -> None:
    record = {
        "messages": TALK,
        "id": 3,
        "source": "v",
        "score": 0.3,
        "scores": {"clip": 0.2, "image": 0.1},
        "topic": "",
    }
    assert compose(record, Reading()).unread() == ()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text("abc é.", max_size=8)
    | st.sampled_from(VALUES[:5] + ["x.gif", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["k", "photo", "n"]), inner, max_size=2)
    ),
    max_leaves=6,
)
extra_names = st.sampled_from(NAMES[:8] + ["topic", "k1", "k2", "Note", "meta", "flag"])
extras = st.dictionaries(extra_names, json_values, max_size=3)


def _media(value: Any) -> bool:
    """Whether a value made by the strategies holds a medium."""
    if isinstance(value, dict):
        return any(_media(part) for part in value.values())
    if isinstance(value, list):
        return any(map(_media, value))
    return value in VALUES[:5] or value == "x.gif"


def _something(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_something, value.values()))
    if isinstance(value, list):
        return any(map(_something, value))
    return value is not None and value is not False and (not isinstance(value, str) or bool(value.strip()))


@settings(max_examples=200)
@given(record=extras, turn=extras, item=extras)
def test_nothing_disappears(record: dict, turn: dict, item: dict) -> None:
    """Every field that holds something is read, counted, or the reason why the sample is bad; every medium is the last."""
    for extra in (record, turn, item):
        extra.pop("image_url", None)  # read of an item
    content = [{"type": "text", "text": "Which?"} | item]
    made = {"messages": [{"role": "user", "content": content} | turn, TALK[1]], "image": "a.png"} | record
    added = dict(record)
    added |= {f"messages[].{name}": value for name, value in turn.items()}
    added |= {f"messages[].content[].{name}": value for name, value in item.items()}
    reason, unread = "", set()
    try:
        unread = set(compose(made, Reading()).unread())
    except BadSample as error:
        reason = error.reason
    if reason:
        assert reason == "unread_media"
        return
    assert unread == {path for path, value in added.items() if _something(value) or value is False}
    assert not any(_media(value) for value in added.values())
    assert not any(
        _something(v) and speaks_of_media(path.rpartition(".")[2]) and not isinstance(v, (int, bool))
        for path, v in added.items()
    )


def _tar(path: Path, members: dict[str, Any]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            data = (
                content
                if isinstance(content, bytes)
                else content.encode()
                if isinstance(content, str)
                else json.dumps(content).encode()
            )
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def _source(path: str, form: str, **options: Any) -> Any:
    [built] = build_sources({"s": SourceConfig(path=path, format=form, **options)}, data_config(), FakeProcessor())
    return built


def _reasons(built: Any) -> dict[str, str]:
    return {shard.key(number): why[0] for shard in built.index.shards for number, why in shard.bad.items()}


DOCUMENT = {"images": ["a.jpg", None], "texts": [None, "x"]}
PLAIN = {"images": [None], "texts": ["x"]}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {  # members of a good sample, by the key of its JSON
    "canonical": {"json": {"items": [{"text": "x"}, {"image": "0.png"}]}, "0.png": RED},
    "energon": {"json": DOCUMENT, "a.jpg": RED},
    "mint1t": {"json": PLAIN},
    "mmc4": {"json": {"text_list": ["x"], "image_info": []}},
    "llava_onevision": {"json": {"texts": TALK}, "jpg": RED},
    "pairs": {"json": {"url": "http://a/0.jpg"}, "jpg": RED, "txt": "x"},
}


@pytest.mark.parametrize("form", LAYOUTS)
def test_fields_of_tar_layouts(tmp_path: Path, form: str) -> None:
    good = LAYOUTS[form]
    members = {}
    for key, extra in (
        ("k", {}),
        ("l", {"topic": "t"}),
        ("m", {"photo": "p"}),
        ("n", {"topic": "t", "more": {"file": "v.mp4"}}),
    ):
        members |= {f"{key}.json": good["json"] | extra} | {
            f"{key}.{name}": data for name, data in good.items() if name != "json"
        }
    path = _tar(tmp_path / "a.tar", members)
    built = _source(path, form)
    assert _reasons(built) == {"m": "unread_media", "n": "unread_media"}
    assert built.index.unread == {"topic": 1}
    assert "m.json" in built.index.shards[0].bad[2][1]
    again = _source(path, form, ignore_fields=["photo", "more"])
    assert _reasons(again) == {}
    assert again.index.unread == {"topic": 2}
    assert again.index.digest() != built.index.digest()


@pytest.mark.parametrize("form", [*LAYOUTS, "m4_documents", "m4_conversations"])
def test_members_of_tar_layouts(tmp_path: Path, form: str) -> None:
    numbered = {"0.text.txt": "x"} if form == "m4_documents" else {"0.text.txt": [{"user": "q", "assistant": "a"}]}
    good = LAYOUTS.get(form, numbered)
    # In pairs and LLaVA-OneVision a further picture is a picture that no text names.
    extra = {"k": {}, "l": {"cls": "3"}, "m": {"seg.mp4": b"v"}, "n": {"depth.npy": b"n"}}
    members = {f"{key}.{name}": data for key, more in extra.items() for name, data in (good | more).items()}
    path = _tar(tmp_path / "a.tar", members)
    built = _source(path, form)
    assert _reasons(built) == {"m": "unread_media"}
    assert built.index.unread == {"member cls": 1, "member npy": 1}
    assert _reasons(_source(path, form, ignore_fields=["*.mp4"])) == {}


def test_a_picture_that_no_text_names_makes_a_canonical_sample_bad(tmp_path: Path) -> None:
    members = {"k.json": {"items": [{"text": "x"}]}, "k.0.png": RED, "l.json": {"items": [{"text": "x"}]}}
    built = _source(_tar(tmp_path / "a.tar", members), "canonical")
    assert _reasons(built) == {"k": "unread_media"}


ROWS = [
    {"messages": TALK, "topic": "t"},
    {"messages": TALK, "topic": "t", "photo": "a/1"},
    {"messages": TALK, "topic": ""},
]


def _written(tmp_path: Path, form: str, rows: list[dict]) -> str:
    if form == "json":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "a.jsonl")
    import pyarrow
    import pyarrow.parquet

    names = {name for row in rows for name in row}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{name: row.get(name) for name in sorted(names)} for row in rows]),
        tmp_path / "a.parquet",
    )
    return str(tmp_path / "a.parquet")


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_what_is_not_read_is_listed_once_per_source(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _written(tmp_path, form, ROWS)
    built = _source(path, form)
    assert _reasons(built) == {"1": "unread_media"}
    assert source_stats(built)["not_read"] == {"topic": 1}
    assert "fields not read: topic (1 of 3)" in caplog.text
    assert "'photo' holds 'a/1'" in built.index.shards[0].bad[1][1]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_options_renew_the_index_and_nothing_else_does(tmp_path: Path, form: str) -> None:
    path = _written(tmp_path, form, ROWS)
    written = lambda: Path(f"{path}.index").stat().st_mtime_ns
    _source(path, form)
    first = written()
    _source(path, form)
    assert written() == first
    named = _source(path, form, ignore_fields=["photo"])
    assert written() != first
    assert _reasons(named) == {}
    assert _reasons(_source(path, form, where="topic == 't'", ignore_fields=["photo"])) == {"2": "skipped"}


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_field_that_no_record_has_is_refused(tmp_path: Path, form: str) -> None:
    path = _written(tmp_path, form, [{"messages": TALK}] * 2)
    with pytest.raises(ConfigError, match=r"sources\.s\.fields\.image is 'photo'"):
        _source(path, form, fields={"image": "photo"})


@pytest.mark.parametrize("form", ["canonical", "m4_documents", "mmc4"])
def test_an_option_that_means_nothing_for_a_format_is_refused(tmp_path: Path, form: str) -> None:
    config = SourceConfig(path=str(tmp_path), format=form, placeholder="<pic>")
    with pytest.raises(ConfigError, match="placeholder"):
        open_sources({"s": config}, data_config(), FakeProcessor())


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_pictures_of_rows_in_every_way(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    coded = base64.b64encode(RED).decode()
    rows: list[dict] = [
        {"image": "a.png"},
        {"image": "data:image/png;base64," + coded},
        {"image": coded},
        {"image": None},
        {"image": ""},
    ]
    rows = [{"question": "Which?", "answer": "Red.", **row} for row in rows]
    if form == "parquet":
        rows += [{"question": "Which?", "answer": "Red.", "image": ""}]
    built = _source(_written(tmp_path, form, rows), form)
    assert not _reasons(built)
    assert [len(built.images(number)) for number in range(5)] == [1, 1, 1, 0, 0]
    assert all(image.getpixel((0, 0)) == (255, 0, 0) for n in range(3) for image in built.images(n).values())


def test_a_document_does_without_the_pictures_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    record = {
        "texts": ["One.", None, None, "Two.", None],
        "images": [None, "gone.png", "a.png", None, "https://x.org/b.png"],
    }
    path = _written(tmp_path, "json", [record, {"texts": [None], "images": ["gone.png"]}])
    assert _reasons_of(path, "json") == {"0": "missing_image", "1": "missing_image"}
    assert _reasons_of(path, "json", missing_images="drop_sample") == {"0": "skipped", "1": "skipped"}
    built = _source(path, "json", missing_images="drop_image")
    assert _reasons(built) == {"1": "no_text"}
    assert [item.get("text") for item in built.read(0).items] == ["One.", None, "Two."]
    assert [image.size for image in built.images(0).values()] == [(20, 10)]
    assert built.index.unread["(an image that is missing)"] == 2
    content, stored = canonical(built, 0)
    assert [item.get("image") for item in content["items"]] == [None, "0.png", None]
    assert stored == {"0.png": RED}


def test_dead_links_of_obelics(tmp_path: Path) -> None:
    lost = {"bytes": None, "path": "https://x.org/b.png"}
    row = {"texts": ["One.", None, None, "Two."], "images": [None, lost, {"bytes": RED, "path": None}, None]}
    path = _written(tmp_path, "parquet", [row | {"metadata": json.dumps([{"src": "https://x.org/b.png"}])}])
    assert _reasons_of(path, "parquet") == {"0": "remote_image"}
    built = _source(path, "parquet", missing_images="drop_image")
    assert [item.get("text") for item in built.read(0).items] == ["One.", None, "Two."]
    assert built.stored_images(0) == [RED]


def _reasons_of(path: str, form: str, **options: Any) -> dict[str, str]:
    sources = open_sources({"s": SourceConfig(path=path, format=form, **options)}, data_config(), FakeProcessor())
    return _reasons(sources[0])


def test_a_stream_says_what_it_does_not_read_and_learns_by_weight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = [TALK[0], TALK[1] | {"weight": 0.5}]
    members: dict[str, Any] = {f"{n}.json": {"messages": talk, "topic": "t"} for n in range(40)}
    members |= {
        "x.json": {"messages": TALK, "photo": "a.jpg"},
        "y.json": {"messages": [TALK[0], {"role": "assistant", "content": ""}]},
    }
    config = SourceConfig(path=_tar(tmp_path / "a.tar", members), stream=True)
    data = data_config(num_workers=0, shuffle=False, sequence_length=128, packing_pool=4)
    loader = StreamLoader(
        {"s": config}, FakeProcessor(), data, seed=0, global_batch_size=1, micro_batch_size=1, stop_step=40
    )
    bad = set()
    for step in loader:
        bad |= {(entry.key, entry.reason) for entry in step.bad}
        [batch] = step.micro_batches
        assert batch.target_weights is not None
        assert set(batch.target_weights.tolist()) == {0.5}
        assert all(record.loss_weight == 0.5 * record.loss_tokens for record in batch.documents)
    assert bad == {("x", "unread_media"), ("y", "empty_answer")}
    assert caplog.text.count("fields not read") == 1
    assert "topic" in caplog.text


def test_options_of_records_in_tar_layouts(tmp_path: Path) -> None:
    """`where`, `fields` and `placeholder` mean the same in every layout that has such records."""
    turns = [{"role": "user", "content": "A <pic> here"}, TALK[1]]
    good = {"score": 2, "topic": "t"}
    layouts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "pairs": (
            {"json": {"title": "A <pic> here"}, "jpg": RED},
            {"fields": {"caption": "title"}, "placeholder": "<pic>"},
        ),
        "llava_onevision": ({"json": {"texts": turns}, "jpg": RED}, {"placeholder": "<pic>"}),
        "canonical": ({"json": {"items": [{"text": "A "}, {"image": "0.png"}, {"text": " here"}]}, "0.png": RED}, {}),
        "energon": (
            {"json": {"texts": ["A ", None, " here", None], "images": [None, "p.png", None, None]}, "p.png": RED},
            {"missing_images": "drop_image"},
        ),
        "mint1t": ({"json": {"texts": ["A here"], "images": [None]}}, {}),
        "mmc4": ({"json": {"text_list": ["A here"], "image_info": []}}, {}),
    }
    for form, (members, options) in layouts.items():
        made: dict[str, Any] = {}
        for key, more in (("k", good), ("l", good | {"score": 1}), ("m", {"topic": "t"})):
            made |= {f"{key}.json": members["json"] | more} | {
                f"{key}.{name}": v for name, v in members.items() if name != "json"
            }
        path = _tar(tmp_path / f"{form}.tar", made)
        built = _source(path, form, where="score > 1", **options)
        assert _reasons(built) == {"l": "skipped", "m": "skipped"}, form
        assert "".join(item.get("text", "|") for item in built.read(0).all_items()).startswith(
            ("A | here", "A here")
        ), form


def test_conversion_keeps_how_much_turns_are_learned(tmp_path: Path) -> None:
    talk = [
        TALK[0],
        {"from": "observation", "value": "red"},
        TALK[1] | {"loss": False},
        TALK[0],
        TALK[1] | {"weight": 0.5},
    ]
    built = _source(_written(tmp_path, "json", [{"messages": talk}]), "json")
    convert(built, tmp_path / "out")
    after = _source(str(tmp_path / "out" / "*.tar"), "canonical")
    assert after.read(0).messages == built.read(0).messages
    assert [message.get("weight", 1) for message in after.read(0).messages] == [1, 0, 0, 1, 0.5]


def test_how_much_documents_are_learned_reaches_the_loss_from_records_and_from_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    rows: list[dict] = [
        {"text": "Whole."},
        {"text": "Half.", "weight": 0.5},
        {"image": "a.png", "caption": "Red.", "weight": 0.25},
    ]
    rows += [{"texts": ["A ", None, "cup."], "images": [None, "a.png", None], "sample_weight": 2.0}]
    built = _source(_written(tmp_path, "json", rows), "json", epochs=1)
    convert(built, tmp_path / "out")
    data = data_config()
    for source in (built, _source(str(tmp_path / "out" / "*.tar"), "canonical", epochs=1)):
        assert [source.read(number).weight for number in range(4)] == [1, 0.5, 0.25, 2]
        collator = Collator([source], FakeProcessor(), data, 0)
        [step] = Plan([source], data, 0, 4).steps()
        batch, bad = collator.batch(step.packs, step.step)
        assert not bad
        weights = {
            record.key.rpartition("-")[2]: (record.loss_weight, record.loss_tokens) for record in batch.documents
        }
        expected = {str(n): (w * len(t) + w, len(t) + 1) for n, (w, t) in enumerate(
            [(1, "Whole."), (0.5, "Half."), (0.25, "Red."), (2, "A cup.")])}  # fmt: skip
        assert {key: (n if w is None else w, n) for key, (w, n) in weights.items()} == expected
        assert sorted(batch.target_weights.tolist()) == sorted(
            w for w, t in [(1.0, "Whole."), (0.5, "Half."), (0.25, "Red."), (2.0, "A cup.")] for _ in range(len(t) + 1)
        )


@pytest.mark.parametrize(
    "value", [b"\x00\x01", [b"x"], {"data": b"x"}, "x.PNG", ["a", "b.mp3"], {"to": "https://x.org/a.webm"}]
)
def test_columns_of_parquet_that_hold_media(tmp_path: Path, value: Any) -> None:
    rows = [{"messages": TALK, "extra": value}, {"messages": TALK, "extra": None}]
    path = _written(tmp_path, "parquet", rows)
    assert _reasons(_source(path, "parquet")) == {"0": "unread_media"}
    assert _reasons(_source(path, "parquet", ignore_fields=["extra"])) == {}


MARKUP = [
    "![](a.jpg)",
    "![A cat](https://x.org/1)",
    "![cat][1]",
    "![[cat.png]]",
    '<img src="a.jpg">',
    "<IMG alt='x' src=a>",
]
MARKUP += ['<video controls src="a.mpg">', "<source src='a.webm'>", "<image href='#1'/>", ".. image:: a.png"]
NO_MARKUP = ["wow!(x) [y](a.html)", "[a](b.jpg)", "a ! [b] (c)", "x <image and> y", "f[i](x)", "!important"]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_of_pictures_is_not_trained_as_text(text: str) -> None:
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"See\n{text} here"}, TALK[1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": f"\n{text}"}]}, TALK[1]], "image": "a.png"},
        {"question": "Which?", "answer": f"\n{text}"},
        {"caption": f"It is\n{text}", "image": "a.png"},
        {"texts": ["x", f"\n{text}"], "images": [None, None]},
    ]
    for record in records:
        with pytest.raises(BadSample) as error:
            compose(record, Reading())
        assert error.value.reason == "stray_placeholder"
        compose(record, Reading.of(SourceConfig(placeholder="literal")))
    found = compose(records[0] | {"image": "a.png"}, Reading.of(SourceConfig(placeholder=[text]))).sample
    assert [item.get("image") for item in found.messages[0]["content"]] == [None, "0", None]


@pytest.mark.parametrize("text", NO_MARKUP)
def test_what_is_no_markup_of_a_picture(text: str) -> None:
    compose({"question": f"See {text}", "answer": "x"}, Reading())


@pytest.mark.parametrize(
    "name", ["a.jpg", "img/a.PNG", "https://x.org/a.webp", base64.b64encode(RED).decode(), "clip.mp4"]
)
def test_the_name_of_a_picture_is_not_trained_as_text(name: str) -> None:
    item, asked = {"type": "text", "text": name}, {"type": "text", "text": "Which?"}
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": content}, TALK[1]]}
        for content in ([name, "Which?"], [item, asked], [{"text": name}, "Which?"], name, [name], [item])
    ]
    records += [{"text": name}, {"texts": [name, "x"], "images": [None, None]}, {"question": name, "answer": "Red."}]
    for record in records:
        with pytest.raises(BadSample, match="nothing but"):
            compose(record, Reading())
        compose(record, Reading.of(SourceConfig(placeholder="literal")))
    with pytest.raises(BadSample, match="nothing but"):
        compose(records[0] | {"image": "b.png"}, Reading())
    compose({"caption": "a.jpg", "image": "a.jpg"}, Reading())
    compose({"messages": [TALK[0], {"role": "assistant", "content": name}]}, Reading())


@pytest.mark.parametrize(
    ("name", "value"), [("figure", "fig-a"), ("Figures", ["fig-a"]), ("diagram", "d12"), ("scan_1", "p/1")]
)
@pytest.mark.parametrize("where", ["record", "turn", "item", "nested"])
def test_a_name_of_a_figure_is_one_of_a_picture(name: str, value: Any, where: str) -> None:
    _check_unread(name, value, where)


@pytest.mark.parametrize(
    ("name", "value"),
    [("figure", "It shows a cup."), ("chart_type", "bar-1"), ("chart", "bar"), ("figure", 3), ("drawing", "")],
)
def test_what_is_said_of_a_figure_is_no_picture(name: str, value: Any) -> None:
    assert set(compose({"messages": TALK, name: value}, Reading()).unread()) <= {name}


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
SAID = '{"name": "look", "arguments": {"at": "sky"}}'
CALLS: dict[str, dict[str, Any]] = {
    "alone": {"content": None, "tool_calls": [CALL]},
    "blank": {"content": "", "tool_calls": [CALL]},
    "next to a text": {"content": "I look.", "tool_calls": [CALL]},
    "as JSON": {"content": "I look.", "tool_calls": json.dumps([CALL])},
    "old": {"content": None, "function_call": CALL["function"]},
    "item": {
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c", "name": "look", "input": {"at": "sky"}},
        ]
    },
    "item alone": {"content": [{"type": "tool_use", "id": "c", "name": "look", "input": {"at": "sky"}}]},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_turn_that_calls_a_tool_is_context(name: str) -> None:
    turn = {"role": "assistant"} | CALLS[name]
    after = [{"role": "tool", "content": "red"}, TALK[1]]
    composed = compose({"messages": [TALK[0], turn, *after]}, Reading())
    assert composed.unread() == ()
    messages = composed.sample.messages
    assert [message.get("weight", 1) for message in messages] == [1, 0, 0, 1]
    text = "".join(item["text"] for item in messages[1]["content"])
    assert text == ("" if "content" not in turn or "I look" not in str(turn["content"]) else "I look.") + SAID
    with pytest.raises(BadSample) as error:
        compose({"messages": [TALK[0], turn, {"role": "tool", "content": "red"}]}, Reading())
    assert error.value.reason == "empty_answer"


def test_tools_that_are_not_called() -> None:
    turn = TALK[1] | {"tool_calls": [], "function_call": None}
    assert "weight" not in compose({"messages": [TALK[0], turn]}, Reading()).sample.messages[1]


def _twice(record: dict[str, Any], name: str) -> str:
    return json.dumps(record)[:-1] + f", {json.dumps(name)}: {json.dumps('x')}" + "}"


@pytest.mark.parametrize("form", ["json", *LAYOUTS, "picture_folder", "m4_conversations", "string"])
def test_a_key_that_occurs_twice_makes_a_sample_bad(tmp_path: Path, form: str) -> None:
    turn = {"role": "user", "content": "Which?"}
    if form in ("json", "string"):
        lines = [
            _twice({"question": "Which?", "answer": "Red."}, "answer"),
            json.dumps({"question": "Which?", "answer": "Red."}),
        ]
        if form == "string":
            turns = [f"[{_twice(turn, 'content')}, {json.dumps(TALK[1])}]", json.dumps(TALK)]
            lines = [json.dumps({"messages": each}) for each in turns]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(lines))
    elif form == "picture_folder":
        path = tmp_path / "f"
        path.mkdir()
        for number, text in enumerate([_twice({"caption": "x"}, "caption"), json.dumps({"caption": "x"})]):
            (path / f"{number}.png").write_bytes(RED)
            (path / f"{number}.json").write_text(text)
    elif form == "m4_conversations":
        turns = [_twice({"user": "q", "assistant": "a"}, "assistant"), json.dumps({"user": "q", "assistant": "a"})]
        path = Path(_tar(tmp_path / "a.tar", {f"{n}.0.text.txt": f"[{each}]" for n, each in enumerate(turns)}))
    else:
        good = LAYOUTS[form]
        name = next(iter(good["json"]))
        members = {"0.json": _twice(good["json"], name), "1.json": json.dumps(good["json"])}
        members |= {f"{n}.{key}": data for n in range(2) for key, data in good.items() if key != "json"}
        path = Path(_tar(tmp_path / "a.tar", dict(sorted(members.items()))))
    built = _source(str(path), "json" if form == "string" else form)
    assert _reasons(built) == {"0": "bad_json"}
    assert "occurs twice" in built.index.shards[0].bad[0][1]


def test_columns_that_have_the_same_name_or_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,answer\nWhich?,Red.,Blue.\n")
    with pytest.raises(ConfigError, match="names 'answer' twice"):
        _source(str(tmp_path / "a.csv"), "csv")
    (tmp_path / "b.csv").write_text(",question,answer,\n0,Which?,Red.,\n1,Which?,Red.,x\n")
    built = _source(str(tmp_path / "b.csv"), "csv")
    assert built.index.unread == {"column 1": 2, "column 4": 1}


def test_columns_of_parquet_that_have_the_same_name(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["Which?"], ["Red."], ["Blue."]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns named 'answer'"):
        _source(str(tmp_path / "a.parquet"), "parquet")


def _moving(form: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp", "png", "avif"])
@pytest.mark.parametrize(
    "form", ["json", "base64", "parquet", "pairs", "canonical", "mmc4", "picture_folder", "stream"]
)
def test_of_several_pictures_in_a_file_the_first_is_read_and_they_are_counted(
    tmp_path: Path, kind: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, coded = _moving(kind), base64.b64encode(_moving(kind)).decode()
    name = f"{kind}.{kind}"
    still = f"0.{kind}"
    if form in ("json", "base64"):
        (tmp_path / name).write_bytes(data)
        (tmp_path / "a.jsonl").write_text(json.dumps({"image": coded if form == "base64" else name, "text": "x"}))
        built = _source(str(tmp_path / "a.jsonl"), "json")
    elif form == "parquet":
        built = _source(
            _written(tmp_path, "parquet", [{"image": {"bytes": data, "path": None}, "text": "x"}]), "parquet"
        )
    elif form == "picture_folder":
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / name).write_bytes(data)
        (tmp_path / "f" / f"{kind}.txt").write_text("x")
        built = _source(str(tmp_path / "f"), "auto")
    else:
        members: dict[str, dict[str, Any]] = {
            "pairs": {f"k.{kind}": data, "k.txt": "x"},
            "canonical": {"k.json": {"items": [{"image": still}, {"text": "x"}]}, f"k.{still}": data},
            "mmc4": {"k.json": {"text_list": ["x"], "image_info": [{"image_base64": coded, "matched_text_index": 0}]}},
        }
        path = _tar(tmp_path / "a.tar", members.get(form, members["canonical"]))
        if form == "stream":
            stored = {
                "__key__": "k",
                "__url__": path,
                "json": json.dumps(members["canonical"]["k.json"]).encode(),
                still: data,
            }
            streamed_sample(CanonicalTar(), stored, set())
            assert "the first picture of a file that holds several" in caplog.text
            return
        built = _source(path, form)
    assert built.index.unread == {SEVERAL_FRAMES: 1}
    pixel = built.images(0)[0].getpixel((5, 5))
    assert pixel[0] > 200
    assert pixel[2] < 60


@pytest.mark.parametrize("form", ["gif", "tiff", "webp", "png", "jpeg", "ico", "avif"])
def test_a_file_of_one_picture_is_not_counted(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, form)
    assert frames_in(buffer.getvalue()) == 1


def test_every_command_lists_once_what_is_not_read(tmp_path: Path, monkeypatch, caplog, capsys) -> None:
    rows = [{"messages": TALK, "topic": "t"}] * 3 + [{"messages": TALK}]
    sources = {"own": SourceConfig(path=_written(tmp_path, "json", rows), format="auto")}
    data = data_config(sources=sources, epochs=1)
    config = Config(data=data, model=ModelConfig(tokenizer="any"), run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(build, "prepared_processor", lambda _: FakeProcessor())
    monkeypatch.setattr(build, "build_layout", lambda *_: FRAMES)
    asked = {
        "index": lambda: data_commands.index(config),
        "stats": lambda: data_commands.stats(config),
        "validate": lambda: inspect_run.validate(config, 1, as_json=True),
        "plan": lambda: inspect_run.plan(config, 1, as_json=True),
        "the start of a run": lambda: build.build_data(config, FakeProcessor(), 0, 1),
    }
    for command, ask in asked.items():
        caplog.clear()
        ask()
        lines = [record.getMessage() for record in caplog.records if "fields not read" in record.getMessage()]
        assert lines == ["data source 'own': fields not read: topic (3 of 4)"], command
        shown = capsys.readouterr().out
        assert command not in ("validate", "plan") or "topic (3 of 4)" in shown
