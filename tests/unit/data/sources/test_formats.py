"""Every format of other projects: what was stored is what is read, and what cannot be read is named."""

import base64
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.convert import convert
from m4train.data.plan.plan import Plan
from m4train.data.source import Source, build_sources
from m4train.errors import DataError
from tests.helpers.data import FakeProcessor, data_config, page_picture, png

RED, BLUE, PAGE = (
    Image.new("RGB", (20, 10), "red"),
    Image.new("RGB", (12, 16), "blue"),
    page_picture("a line of text"),
)


def tar(path: Path, members: dict[str, bytes | str | dict | list]) -> str:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, content in members.items():
            if isinstance(content, (dict, list)):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def source(path: str, form: str) -> Source:
    [built] = build_sources({"s": SourceConfig(path=path, format=form)}, data_config(), FakeProcessor())
    return built


def check(built: Source, number: int, said: list, images: list[Image.Image]) -> None:
    """`said`: the texts, and None where an image stands, of a document; or (role, such a list) of a conversation."""
    sample = built.read(number)

    def shown(items: list[dict]) -> list:
        return [item.get("text") for item in items]

    if sample.items is not None:
        assert shown(sample.items) == said
    else:
        assert [(message["role"], shown(message["content"])) for message in sample.messages] == said
    read = built.images(number)
    assert list(read) == list(range(len(images)))
    for image, stored in zip(read.values(), images):
        assert np.array_equal(np.asarray(image), np.asarray(stored))
    if len(images) > 1:
        assert np.array_equal(np.asarray(built.images(number, [1])[1]), np.asarray(images[1]))


def reasons(built: Source) -> dict[str, str]:
    return {shard.key(number): why[0] for shard in built.index.shards for number, why in shard.bad.items()}


def test_m4_documents(tmp_path: Path) -> None:
    texts = {f"7_a.{number}.text.txt": f"Text {number}." for number in (0, 9, 8, 7, 6, 5, 4, 3, 2)}
    members = {
        **texts,
        "7_a.10.image.jpeg": png(BLUE),
        "7_a.1.image.jpeg": png(RED),
        "7_a.metadata.txt": repr([*texts, "7_a.1.image.jpeg", "7_a.10.image.jpeg"]),
        "8_b.0.text.txt": "x",
        "8_b.metadata.txt": repr(["8_b.0.text.txt", "8_b.1.image.jpeg"]),
        "9_c.0.text.txt": "x",
        "9_c.metadata.txt": "5",
    }
    built = source(tar(tmp_path / "a.tar", members), "m4_documents")
    said = ["Text 0.", None, *(f"Text {number}." for number in range(2, 10)), None]
    check(built, 0, said, [RED, BLUE])
    assert reasons(built) == {"8_b": "missing_member", "9_c": "bad_text"}


def test_m4_parts_are_numbered_without_gaps_and_repetitions(tmp_path: Path) -> None:
    members = {
        "0_a.0.text.txt": "x",
        "0_a.2.text.txt": "y",
        "1_b.1.text.txt": "x",
        "2_c.0.text.txt": "x",
        "2_c.0.image.jpeg": png(RED),
        "3_d.0.text.txt": "x",
    }
    built = source(tar(tmp_path / "a.tar", members), "m4_documents")
    assert reasons(built) == {"0_a": "missing_member", "1_b": "missing_member", "2_c": "duplicate_member"}
    details = [detail for _, detail in built.index.shards[0].bad.values()]
    assert "0_a has no part numbered 1" in details[0]
    assert "1_b has no part numbered 0" in details[1]
    assert "0.image.jpeg, 0.text.txt" in details[2]


def test_m4_conversations(tmp_path: Path) -> None:
    turns = [{"user": "Which?", "assistant": "Red.", "source": "v"}, {"user": "And?", "assistant": "Blue."}]
    members = {"k.0.image.jpeg": png(RED), "k.1.image.jpeg": png(BLUE), "k.2.text.txt": turns}
    built = source(tar(tmp_path / "a.tar", members), "m4_conversations")
    said = [("user", [None, None, "Which?"]), ("assistant", ["Red."]), ("user", ["And?"]), ("assistant", ["Blue."])]
    check(built, 0, said, [RED, BLUE])
    assert built.read(0).source == {"dataset": "v"}


def test_m4_conversations_in_several_texts_lose_no_turn(tmp_path: Path) -> None:
    turns = [[{"user": f"Q{number}", "assistant": f"A{number}"}] for number in range(3)]
    members = {
        "k.0.image.jpeg": png(RED),
        "k.1.text.txt": turns[0],
        "k.2.text.txt": turns[1] + turns[2],
        "l.0.text.txt": turns[0],
        "l.1.image.jpeg": png(RED),
        "m.0.text.txt": turns[0],
        "m.1.text.txt": turns[1][0],
    }
    built = source(tar(tmp_path / "a.tar", members), "m4_conversations")
    roles = (("user", "Q"), ("assistant", "A"))
    said = [(role, [f"{letter}{number}"]) for number in range(3) for role, letter in roles]
    check(built, 0, [("user", [None, "Q0"]), *said[1:]], [RED])
    assert reasons(built) == {"l": "image_order", "m": "bad_json"}


def test_pairs(tmp_path: Path) -> None:
    members = {
        "0.jpg": png(RED),
        "0.json": {"caption": "no", "url": "http://a/0.jpg"},
        "0.txt": "A red card.",
        "1.json": {"caption": "A blue card."},
        "1.webp": png(BLUE),
        "2.image.jpeg": png(PAGE),
        "2.text.txt": "A page.",
        "3.answer.txt": "Red.",
        "3.image.jpeg": png(RED),
        "3.json": {"url": "http://a/3.jpg"},
        "3.question.txt": "Which colour?",
        "4.jpg": png(RED),
        "4.json": {"caption": None},
        "5.txt": "alone",
        "6.jpg": png(RED),
        "6.json": "{",
        "6.txt": "A record that says nothing.",
    }
    built = source(tar(tmp_path / "a.tar", members), "pairs")
    check(built, 0, [None, "A red card."], [RED])
    check(built, 1, [None, "A blue card."], [BLUE])
    check(built, 2, [None, "A page."], [PAGE])
    check(built, 3, [("user", [None, "Which colour?"]), ("assistant", ["Red."])], [RED])
    assert [built.read(number).source.get("url") for number in range(4)] == [
        "http://a/0.jpg",
        None,
        None,
        "http://a/3.jpg",
    ]
    assert reasons(built) == {"4": "no_text", "5": "missing_image", "6": "bad_json"}


def test_energon_interleaved(tmp_path: Path) -> None:
    members = {
        "k.json": {"images": [None, "a.jpg", None, "b.png"], "texts": ["One.", None, "Two.", None]},
        "k.a.jpg": png(RED),
        "k.b.png": png(BLUE),
        "l.json": {"images": ["a.jpg"], "texts": ["both"]},
        "m.json": {"images": ["a.jpg"], "texts": [None]},
    }
    built = source(tar(tmp_path / "a.tar", members), "energon")
    check(built, 0, ["One.", None, "Two.", None], [RED, BLUE])
    assert reasons(built) == {"l": "bad_json", "m": "missing_image"}


def test_mint1t(tmp_path: Path) -> None:
    tiff = io.BytesIO()
    RED.copy().save(tiff, "tiff", save_all=True, append_images=[PAGE.copy()])
    record = {"texts": ["One.", None, None], "images": [None, "page_0_image_85", "page_1_image_3"], "url": "u"}
    sizes = [{"page": page, "width": image.width, "height": image.height} for page, image in enumerate((RED, PAGE))]
    records = {
        "k": record | {"image_metadata": sizes},
        "l": {"texts": ["One.", None], "images": [None, "page_1_image_3"]},
        "m": record | {"image_metadata": sizes[::-1]},
        "n": record | {"image_metadata": sizes[:1]},
        "o": record | {"image_metadata": None},
    }
    members = {f"{key}.json": content for key, content in records.items()}
    members |= {f"{key}.tiff": tiff.getvalue() for key in records}
    members |= {"p.json": record, "p.tiff": png(RED), "q.json": record, "q.tiff": tiff.getvalue()[:9]}
    built = source(tar(tmp_path / "a.tar", {name: members[name] for name in sorted(members)}), "mint1t")
    check(built, 0, ["One.", None, None], [RED, PAGE])
    check(built, 4, ["One.", None, None], [RED, PAGE])
    counts = dict.fromkeys("lmnp", "image_count")
    assert reasons(built) == counts | {"q": "unreadable_image"}
    details = [detail for _, detail in built.index.shards[0].bad.values()]
    assert "2 frames for 1 image names" in details[0]
    assert "frame 0 has the size (20, 10)" in details[1]
    assert "`image_metadata` describes 1 images" in details[2]


def test_mmc4(tmp_path: Path) -> None:
    coded = [base64.b64encode(png(image)).decode() for image in (RED, BLUE)]
    infos = [
        {"image_base64": coded[0], "matched_text_index": 1},
        {"image_name": "lost"},
        {"image_base64": coded[1]},
    ]
    record = {"text_list": ["One.", "Two."], "image_info": infos, "similarity_matrix": [[0, 1], [0, 0], [0.9, 0.1]]}
    good = {"image_base64": coded[0], "matched_text_index": 0}
    bad = {
        "l": {"text_list": ["One."], "image_info": [{"image_base64": "%%%", "matched_text_index": 0}]},
        "m": {"text_list": ["One."], "image_info": [good, {"image_base64": coded[1], "matched_text_index": 7}]},
        "n": {"text_list": ["One."], "image_info": [{"image_base64": coded[0], "matched_text_index": -1}]},
        "o": {"text_list": ["One.", None], "image_info": [good]},
        "p": {"text_list": ["One."], "image_info": [{"image_base64": 5, "matched_text_index": 0}]},
        "q": {"text_list": ["One."], "image_info": [{"image_base64": coded[0]}], "similarity_matrix": [[0, 1]]},
    }
    members = {"k.json": record} | {f"{key}.json": content for key, content in bad.items()}
    built = source(tar(tmp_path / "a.tar", members), "mmc4")
    check(built, 0, [None, "One.", None, " Two."], [BLUE, RED])
    assert reasons(built) == {"l": "unreadable_image"} | dict.fromkeys("mnopq", "bad_json")
    details = [detail for _, detail in built.index.shards[0].bad.values()]
    assert "image 1 is matched with sentence 7 of 1" in details[1]
    assert "text_list[1] is a NoneType" in details[3]


def test_llava_onevision(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>\nFirst, <image> second?"}, {"role": "assistant", "content": "Yes."}]
    members = {
        "k.json": {"texts": turns, "name": ["x.jpg", "y.jpg"]},
        "k.0_x.jpg": png(RED),
        "k.1_y.jpg": png(BLUE),
        "l.json": {"texts": turns},
        "l.jpg": png(RED),
    }
    built = source(tar(tmp_path / "a.tar", members), "llava_onevision")
    check(built, 0, [("user", [None, "First, ", None, " second?"]), ("assistant", ["Yes."])], [RED, BLUE])
    assert reasons(built) == {"l": "image_count"}


def test_llava_onevision_takes_the_images_that_it_names(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Compare."}, {"role": "assistant", "content": "Yes."}]
    pair = {"0_x.jpg": png(RED), "1_y.jpg": png(BLUE)}
    records = {
        "k": ({"texts": turns, "name": ["1_y.jpg", "0_x.jpg"]}, pair),
        "l": ({"texts": turns, "name": ["0_x.jpg", "1_y.jpg"]}, {"1_y.jpg": png(BLUE)}),
        "m": ({"texts": turns, "name": ["red card.jpg"]}, {"jpg": png(RED)}),
        "n": ({"texts": turns, "name": []}, {"1_b.jpg": png(BLUE), "0_a.jpg": png(RED)}),
        "o": ({"texts": turns, "name": [5]}, pair),
        "p": ({"images": list(pair), "prompts": ["p", "q"], "captions": ["c", "d"]}, pair),
    }
    members = {}
    for key, (record, images) in records.items():
        members |= {f"{key}.json": record} | {f"{key}.{name}": data for name, data in images.items()}
    built = source(tar(tmp_path / "a.tar", members), "llava_onevision")
    answer = ("assistant", ["Yes."])
    check(built, 0, [("user", [None, None, "Compare."]), answer], [BLUE, RED])
    check(built, 2, [("user", [None, "Compare."]), answer], [RED])
    check(built, 3, [("user", [None, None, "Compare."]), answer], [RED, BLUE])
    assert reasons(built) == {"l": "missing_image", "o": "bad_json", "p": "packed_variant"}
    details = [detail for _, detail in built.index.shards[0].bad.values()]
    assert "'0_x.jpg'" in details[0]
    assert "`prompts`" in details[2]


LLAVA = {
    "id": "1",
    "image": "pictures/red.png",
    "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Red."}],
}
SHAREGPT = {
    "messages": [{"role": "user", "content": "<image><image>Same?"}, {"role": "assistant", "content": "No."}],
    "images": ["pictures/red.png", "pictures/blue.png"],
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Which?"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(BLUE)).decode()},
                },
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Blue é."}]},
    ]
}
REMOTE = {"image": "https://example.org/a.jpg", "conversations": LLAVA["conversations"]}
COUNT = {"images": ["pictures/red.png"], "messages": SHAREGPT["messages"]}
LOST = {"image": "pictures/none.png", "conversations": LLAVA["conversations"]}


@pytest.mark.parametrize("array", [True, False], ids=["array", "lines"])
def test_json_of_llava_sharegpt_and_messages(tmp_path: Path, array: bool) -> None:
    (tmp_path / "pictures").mkdir()
    RED.save(tmp_path / "pictures" / "red.png")
    BLUE.save(tmp_path / "pictures" / "blue.png")
    records = [LLAVA, SHAREGPT, OPENAI, REMOTE, COUNT, LOST]
    text = json.dumps(records, ensure_ascii=False, indent=1)
    if not array:
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    (tmp_path / "a.json").write_text(text)
    built = source(str(tmp_path / "a.json"), "json")
    check(built, 0, [("user", [None, "Which?"]), ("assistant", ["Red."])], [RED])
    check(built, 1, [("user", [None, None, "Same?"]), ("assistant", ["No."])], [RED, BLUE])
    said = [("system", ["Be short."]), ("user", ["Which?", None]), ("assistant", ["Blue é."])]
    check(built, 2, said, [BLUE])
    assert reasons(built) == {"3": "remote_image", "4": "image_count", "5": "missing_image"}


USER = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}]


def json_file(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_system_prompt_of_a_record_is_its_first_turn_unless_a_turn_is_one(tmp_path: Path) -> None:
    own = [{"from": "system", "value": "Own."}, *USER]
    records = [
        {"system": "Short.", "conversations": USER},
        {"system": "Short.", "conversations": own},
        {"system": "Short.", "texts": [{"user": "Which?", "assistant": "Red."}]},
        {"system": "", "conversations": USER},
        {"system": ["Short."], "conversations": USER},
    ]
    said = [("user", ["Which?"]), ("assistant", ["Red."])]
    built = source(json_file(tmp_path / "a.jsonl", records), "json")
    check(built, 0, [("system", ["Short."]), *said], [])
    check(built, 1, [("system", ["Own."]), *said], [])
    check(built, 2, [("system", ["Short."]), *said], [])
    check(built, 3, said, [])
    assert reasons(built) == {"4": "bad_json"}
    built = source(parquet(tmp_path / "a.parquet", records[:1]), "parquet")
    check(built, 0, [("system", ["Short."]), *said], [])


def test_images_that_no_place_is_left_for_are_counted(tmp_path: Path) -> None:
    for name, image in (("red.png", RED), ("blue.png", BLUE)):
        image.save(tmp_path / name)
    content = [{"type": "image", "image": "blue.png"}, {"type": "text", "text": "Which?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Blue."}]
    records = [
        {"messages": messages, "images": ["blue.png"]},
        {"messages": messages, "images": ["red.png"]},
        {"messages": messages, "images": ["blue.png", "red.png"]},
    ]
    built = source(json_file(tmp_path / "a.jsonl", records), "json")
    check(built, 0, [("user", [None, "Which?"]), ("assistant", ["Blue."])], [BLUE])
    assert reasons(built) == {"1": "image_count", "2": "image_count"}
    assert "0 places for images but 2 images, next to 1 that name their own" in built.index.shards[0].bad[2][1]


def test_base64_may_be_short_or_in_lines(tmp_path: Path) -> None:
    tiny, noise = Image.new("RGB", (1, 1), "red"), Image.effect_noise((20, 20), 50).convert("RGB")
    short = base64.b64encode(png(tiny)).decode()
    assert len(short) < 256
    wrapped = base64.encodebytes(png(noise)).decode()
    coded = [short, wrapped, "data:image/png;base64," + wrapped, "pictures/nofileatall"]
    records = [{"image": image, "conversations": LLAVA["conversations"]} for image in coded]
    built = source(json_file(tmp_path / "a.jsonl", records), "json")
    for number, image in enumerate((tiny, noise, noise)):
        check(built, number, [("user", [None, "Which?"]), ("assistant", ["Red."])], [image])
    assert reasons(built) == {"3": "missing_image"}


@pytest.mark.parametrize(
    ("damaged", "byte", "what"),
    [
        ("[{0}, {0}", "", "the file ends before its array does"),
        ("[{0}, {0},\n", "", "the file ends before its array does"),
        ('[{0}, {0}, {{"conversations": [', '{"conversations": [', "Expecting value"),
        ("[{0}, {0}] more", " more", "behind the end of the array"),
        ("[{0}, {0}, ?, {0}]", "?, ", "Expecting value"),
    ],
    ids=["no_bracket", "comma", "in_a_record", "more", "no_json"],
)
def test_a_broken_array_keeps_the_records_before_and_names_the_byte(
    tmp_path: Path, damaged: str, byte: str, what: str
) -> None:
    turns = [{"from": "human", "value": "Whích?"}, USER[1]]
    text = damaged.format(json.dumps({"conversations": turns}, ensure_ascii=False))
    (tmp_path / "a.json").write_text(text, "utf-8")
    built = source(str(tmp_path / "a.json"), "json")
    assert reasons(built) == {"2": "bad_json"}
    for number in range(2):
        check(built, number, [("user", ["Whích?"]), ("assistant", ["Red."])], [])
    _, detail = built.index.shards[0].bad[2]
    place = len(text[: text.rindex(byte)].encode()) if byte else len(text.encode())
    assert f"from byte {place} on" in detail
    assert what in detail


def test_bytes_that_are_no_text_cost_their_record_only(tmp_path: Path) -> None:
    data = json.dumps([{"conversations": USER}] * 3).encode()
    place = data.index(b"Which", 80)
    (tmp_path / "a.json").write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    built = source(str(tmp_path / "a.json"), "json")
    assert reasons(built) == {"1": "bad_json"}
    check(built, 2, [("user", ["Which?"]), ("assistant", ["Red."])], [])


@pytest.mark.parametrize("indent", [None, 1, "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte_order_mark"])
@pytest.mark.parametrize("count", [1, 2])
def test_objects_over_several_lines_are_one_record_each(tmp_path: Path, indent, mark: str, count: int) -> None:
    text = json.dumps({"conversations": USER}, indent=indent)
    (tmp_path / "a.json").write_text(mark + "\n".join([text] * count), "utf-8")
    built = source(str(tmp_path / "a.json"), "json")
    assert len(built) == count
    assert not reasons(built)
    check(built, count - 1, [("user", ["Which?"]), ("assistant", ["Red."])], [])
    if indent:
        (tmp_path / "a.json").write_text(mark + "\n".join([text] * 2)[:-9], "utf-8")
        built = source(str(tmp_path / "a.json"), "json")
        assert reasons(built) == {"1": "bad_json"}


def parquet(path: Path, rows: list[dict], group: int = 2) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def stored(image: Image.Image | None) -> dict | None:
    return image and {"bytes": png(image), "path": "a.png"}


@pytest.mark.parametrize("form", ["mmc4", "mint1t", "pairs", "json", "parquet"])
def test_conversion_keeps_texts_pixels_and_stored_bytes(tmp_path: Path, form: str) -> None:
    tiff = io.BytesIO()
    RED.copy().save(tiff, "tiff", save_all=True, append_images=[PAGE.copy()])
    coded = base64.b64encode(png(BLUE)).decode()
    record = {"text_list": ["One."], "image_info": [{"image_base64": coded, "matched_text_index": 0}]}
    parallel = {"texts": ["One.", None, None], "images": [None, "a", "b"]}
    if form == "json":
        path = str(tmp_path / "a.v1.json")
        Path(path).write_text(json.dumps([OPENAI]))
    elif form == "parquet":
        path = parquet(
            tmp_path / "a.v1.parquet", [{"images": [stored(RED)], "texts": [{"user": "Q", "assistant": "A"}]}]
        )
    else:
        members = {
            "mmc4": {"k.json": record},
            "mint1t": {"k.json": parallel, "k.tiff": tiff.getvalue()},
            "pairs": {"k.jpg": png(RED), "k.txt": "Red.", "l.txt": "alone"},
        }
        path = tar(tmp_path / "a.v1.tar", members[form])
    before = source(path, form)
    counts = convert(before, tmp_path / "out")
    assert counts == ({"written": 1, "missing_image": 1} if form == "pairs" else {"written": 1})
    after = source(str(tmp_path / "out" / "*.tar"), "canonical")
    assert after.key(0).startswith("a_v1-")
    texts = [[item.get("text") for item in built.read(0).all_items()] for built in (before, after)]
    assert texts[0] == texts[1]
    images = [built.images(0) for built in (before, after)]
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(*(i.values() for i in images)))
    if form != "mint1t":
        assert before.stored_images(0) == after.stored_images(0)


def test_parquet_of_images_and_turns(tmp_path: Path) -> None:
    turns = [{"user": "Which?", "assistant": "Red.", "source": "v"}]
    rows = [
        {"images": [stored(RED), stored(BLUE)], "texts": turns},
        {"images": [], "texts": turns},
        {"images": [{"bytes": None, "path": "http://x"}], "texts": turns},
    ]
    built = source(parquet(tmp_path / "a.parquet", rows), "parquet")
    check(built, 0, [("user", [None, None, "Which?"]), ("assistant", ["Red."])], [RED, BLUE])
    check(built, 1, [("user", ["Which?"]), ("assistant", ["Red."])], [])
    assert reasons(built) == {"2": "remote_image"}


def test_parquet_of_parallel_lists_and_of_conversations(tmp_path: Path) -> None:
    rows = [{"images": [None, stored(RED), None], "texts": ["One.", None, "Two."]}]
    built = source(parquet(tmp_path / "a.parquet", rows), "parquet")
    check(built, 0, ["One.", None, "Two."], [RED])
    rows = [{"image": stored(PAGE), "conversations": LLAVA["conversations"]}]
    built = source(parquet(tmp_path / "b.parquet", rows), "parquet")
    check(built, 0, [("user", [None, "Which?"]), ("assistant", ["Red."])], [PAGE])


def test_parquet_is_drawn_window_by_window_so_that_row_groups_are_read_once(tmp_path: Path) -> None:
    turns = [[{"user": "Number?", "assistant": str(number)}] for number in range(40)]
    path = parquet(tmp_path / "a.parquet", [{"images": [stored(RED)], "texts": text} for text in turns], group=5)
    data = data_config(epochs=2, shuffle_window=2, packing_pool=1)
    [built] = build_sources({"s": SourceConfig(path=path, format="parquet")}, data, FakeProcessor())
    steps = Plan([built], data, 0, 4).steps()
    drawn = [(unit.epoch, unit.sample) for step in steps for pack in step.packs for unit in pack.units]
    orders = [[sample for epoch, sample in drawn if epoch == which] for which in range(2)]
    assert [sorted(order) for order in orders] == [list(range(40))] * 2
    assert orders[0] != orders[1]
    built.shard_format.groups_read = 0
    for _, sample in drawn:
        built.images(sample)
    assert built.shard_format.groups_read <= 2 * 8 + 2  # a window's end may lie in the next pack


@pytest.mark.parametrize("checksums", [False, True])
def test_page_checksums_of_parquet_are_compared_where_there_are_some(tmp_path: Path, checksums: bool) -> None:
    """A flipped bit in a page reads as another text if there is no checksum; with one it costs its row group, by name."""
    import pyarrow.parquet

    table = pyarrow.table({"texts": [[f"text number {number} of some length"] for number in range(8)]})
    path = tmp_path / "a.parquet"
    layout = {"compression": "none", "use_dictionary": False, "write_statistics": False, "row_group_size": 4}
    pyarrow.parquet.write_table(table, path, write_page_checksum=checksums, **layout)
    whole = path.read_bytes()
    for number in range(8):
        flipped = bytearray(whole)
        flipped[whole.index(f"text number {number} of".encode()) + 2] ^= 1 << number % 3
        path.write_bytes(flipped)
        if checksums:
            built = source(str(path), "parquet")
            named = reasons(built)
            assert list(named.values()) == ["damaged"] * 4, named
            good = set(range(8)) - set(range(number // 4 * 4, number // 4 * 4 + 4))
            assert all(built.read(row).items[0]["text"] == f"text number {row} of some length" for row in good)
        else:  # nothing can tell
            assert "text number" not in source(str(path), "parquet").read(number).items[0]["text"]


def test_a_file_that_is_no_parquet_and_one_without_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("nothing")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet"):
        source(str(tmp_path / "a.parquet"), "parquet")
    with pytest.raises(DataError, match="none of texts"):
        source(parquet(tmp_path / "b.parquet", [{"topic": "x"}]), "parquet")


def test_json_of_documents_and_of_pairs_and_with_plain_base64(tmp_path: Path) -> None:
    BLUE.save(tmp_path / "blue.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    records = [
        {"texts": ["One.", None, "Two."], "images": [None, "blue.png", None], "url": "u"},
        {"texts": [{"user": "Which?", "assistant": "Blue."}], "images": ["blue.png"]},
        {"image": base64.b64encode(png(noise)).decode(), "conversations": LLAVA["conversations"]},
        {"image": "A" * 400, "conversations": LLAVA["conversations"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    built = source(str(tmp_path / "a.jsonl"), "json")
    check(built, 0, ["One.", None, "Two."], [BLUE])
    assert built.read(0).source == {"url": "u"}
    check(built, 1, [("user", [None, "Which?"]), ("assistant", ["Blue."])], [BLUE])
    check(built, 2, [("user", [None, "Which?"]), ("assistant", ["Red."])], [noise])
    assert reasons(built) == {"3": "unreadable_image"}


def test_obelics_with_its_images_fetched(tmp_path: Path) -> None:
    origin = {"url": "http://a", "warc_filename": "w", "warc_record_offset": 1, "warc_record_length": 2}
    row = {
        "images": [png(RED), None, png(PAGE)],
        "texts": [None, "Between.", None],
        "metadata": json.dumps([{"src": "s"}, None, {"src": "t"}]),
        "general_metadata": json.dumps(origin),
    }
    lost = row | {"images": [None, None, png(PAGE)]}
    built = source(parquet(tmp_path / "a.parquet", [row, lost]), "parquet")
    check(built, 0, [None, "Between.", None], [RED, PAGE])
    assert built.read(0).source == origin
    assert reasons(built) == {"1": "bad_json"}


def test_parquet_of_messages_with_places_for_images(tmp_path: Path) -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    answer = [{"type": "text", "text": "Red."}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
    built = source(parquet(tmp_path / "a.parquet", [row | {"images": [stored(RED)]}]), "parquet")
    check(built, 0, [("user", [None, "Which?"]), ("assistant", ["Red."])], [RED])


def test_parquet_of_pdfs_is_refused(tmp_path: Path) -> None:
    row = {"pdf": b"%PDF", "texts": [{"user": "Q", "assistant": "A"}]}
    with pytest.raises(DataError, match="render them to images"):
        source(parquet(tmp_path / "a.parquet", [row]), "parquet")


@pytest.mark.parametrize(
    ("form", "members", "member"),
    [
        ("canonical", {"k.json": "{"}, "k.json"),
        ("canonical", {"k.0.png": "no picture", "k.json": {"items": [{"image": "0.png"}]}}, "0.png"),
        ("m4_documents", {"k.0.text.txt": "x", "k.metadata.txt": "["}, "k.metadata.txt"),
        ("m4_documents", {"k.0.text.txt": "x", "k.1.image.jpeg": "no picture"}, "1.image.jpeg"),
        ("energon", {"k.json": {"images": ["a.jpg"], "texts": ["both"]}}, "k.json"),
        ("energon", {"k.json": {"images": ["a.jpg"], "texts": [None]}}, "a.jpg"),
        ("mint1t", {"k.json": {"images": ["p"], "texts": [None]}, "k.tiff": "no picture"}, "tiff"),
        ("mmc4", {"k.json": {"text_list": "no list"}}, "k.json"),
        ("llava_onevision", {"k.json": {"texts": []}}, "k.json"),
        ("pairs", {"k.jpg": "no picture", "k.txt": "x"}, "jpg"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_name_of_its_member(
    tmp_path: Path, form: str, members: dict, member: str
) -> None:
    good = {
        "canonical": {"z.json": {"items": [{"text": "x"}]}},
        "m4_documents": {"z.0.text.txt": "x"},
        "energon": {"z.json": {"images": [None], "texts": ["x"]}},
        "mint1t": {"z.json": {"images": [None], "texts": ["x"]}},
        "mmc4": {"z.json": {"text_list": ["x"], "image_info": []}},
        "llava_onevision": {
            "z.json": {"texts": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
        },
        "pairs": {"z.jpg": png(RED), "z.txt": "x"},
    }
    built = source(tar(tmp_path / "a.tar", members | good[form]), form)
    [(_, detail)] = built.index.shards[0].bad.values()
    assert member in detail
