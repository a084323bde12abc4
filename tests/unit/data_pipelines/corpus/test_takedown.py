"""What is found to be taken down, in every format of tars, and that compacted shards are as if it had never been there."""

import base64
import gzip
import hashlib
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from data_pipelines.corpus.takedown import Takedown
from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.runner import run_pipeline
from m4train.config import DataConfig, SourceConfig
from m4train.data.index.tombstones import TOMBSTONES
from m4train.data.shards import ShardWriter
from m4train.data.source import open_sources
from m4train.errors import BadSample, ConfigError, DataError
from tests.helpers.data import FakeProcessor
from tests.helpers.pipelines import picture

URLS = [
    "http://a.org/1",
    "http://sub.a.org/2",
    "http://nota.org/3",
    "https://b.com:8080/4",
    "http://c.net/5",
    "http://[bad/6",
]


def _write(folder):
    with ShardWriter(folder, max_samples=4) as writer:
        for number, url in enumerate(URLS * 2):
            image = {"image": "0.png", "source": f"http://img.org/{number}.png"}
            sample = {"items": [{"text": f"Text {number}."}, image], "source": {"url": url}}
            writer.write(f"key{number:02d}", sample, {"0.png": picture(number)})
    return folder


def _open(folder):
    (source,) = open_sources({"a": SourceConfig(path=str(folder), format="canonical")}, DataConfig(), FakeProcessor())
    return source


def _readable(folder):
    source = _open(folder)
    return {source.key(number) for number in range(len(source)) if number not in _bad(source)}


def _bad(source):
    found = set()
    for number in range(len(source)):
        try:
            source.read(number)
        except BadSample:
            found.add(number)
    return found


@pytest.mark.parametrize(
    ("named", "gone"),
    [
        ({"urls": ["http://c.net/5"]}, {4, 10}),
        ({"urls": ["http://img.org/7.png"]}, {7}),
        ({"domains": ["a.org"]}, {0, 1, 6, 7}),
        ({"domains": ["A.ORG", "b.com"]}, {0, 1, 6, 7, 3, 9}),
        ({"domains": ["org"]}, set(range(12))),  # all images are of img.org
        ({"domains": ["no.such"]}, set()),
        ({"images": [hashlib.sha256(picture(5)).hexdigest().upper()]}, {5}),
        ({"keys": ["key03", "key04"]}, {3, 4}),
        ({"urls": ["http://a.org/1"], "images": [hashlib.sha256(picture(11)).hexdigest()]}, {0, 6, 11}),
    ],
)
def test_samples_are_named_by_url_domain_image_or_key(tmp_path, named, gone):
    folder = _write(tmp_path / "shards")
    step = Takedown(str(folder), {"format": "canonical"}, **named)
    for rank in range(2):
        list(step.run(None, rank, 2))
    keys = {f"key{number:02d}" for number in range(12)}
    assert _readable(folder) == keys - {f"key{number:02d}" for number in gone}
    assert step.ledger.counts["samples"] == 12
    assert step.ledger.counts["taken down"] == len(gone)
    if gone:
        lines = [json.loads(line) for line in (folder / TOMBSTONES).read_text().splitlines()]
        assert {(line["shard"], line["key"]) for line in lines} == {
            (f"shard-{n // 4:06d}.tar", f"key{n:02d}") for n in gone
        }


def test_the_command_takes_down_and_compacts_to_the_bytes_of_shards_that_never_had_them(tmp_path, capsys):
    folder = _write(tmp_path / "shards")
    _open(folder)  # makes the indexes
    before = {name: (folder / name).stat().st_size for name in os.listdir(folder) if name.endswith(".tar")}
    start = lambda *more: run_pipeline(load_pipeline("takedown", [f"shards={folder}", *more]))
    assert start(f"folder={tmp_path / 'one'}", "domains=[a.org]") == 0
    assert "taken down 4" in " ".join(capsys.readouterr().out.split())
    assert {name: (folder / name).stat().st_size for name in before} == before  # nothing is rewritten
    kept = _readable(folder)
    assert start(f"folder={tmp_path / 'two'}", "compact=true") == 0
    source = _open(folder)
    assert {source.key(number) for number in range(len(source))} == kept
    assert not source.index.bad_count
    assert not source.index.taken_down()
    assert [hashlib.sha256(source.stored_images(n)[0]).hexdigest() for n in range(len(source))] == [
        hashlib.sha256(picture(int(key[3:]))).hexdigest() for key in sorted(kept)
    ]
    with ShardWriter(tmp_path / "never", max_samples=4) as writer:
        for number in (2, 3):
            image = {"image": "0.png", "source": f"http://img.org/{number}.png"}
            sample = {"items": [{"text": f"Text {number}."}, image], "source": {"url": URLS[number]}}
            writer.write(f"key{number:02d}", sample, {"0.png": picture(number)})
    assert (tmp_path / "never" / "shard-000000.tar").read_bytes() == (folder / "shard-000000.tar").read_bytes()


TURNS = [{"user": "Which?", "assistant": "That."}]
ROLES = [{"role": "user", "content": "<image>\nWhich?"}, {"role": "assistant", "content": "That."}]
INTERLEAVED = {"images": [None, "a.jpg"], "texts": ["One.", None]}


def _tiff(number):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(number))).save(buffer, "tiff")
    return buffer.getvalue()


OTHERS = {  # the members of a sample
    "m4_documents": lambda n: {"0.text.txt": "One.", "1.image.jpeg": picture(n), "metadata.txt": f"['{n}.0.text.txt', '{n}.1.image.jpeg']"},
    "m4_conversations": lambda n: {"0.image.jpeg": picture(n), "1.text.txt": json.dumps(TURNS)},
    "pairs": lambda n: {"jpg": picture(n), "txt": "A caption.", "json": json.dumps({"url": f"http://a.org/{n}"})},
    "energon": lambda n: {"json": json.dumps(INTERLEAVED), "a.jpg": picture(n)},
    "mint1t": lambda n: {"json": json.dumps({"texts": ["One.", None], "images": [None, "page_0_image_1"]}), "tiff": _tiff(n)},
    "mmc4": lambda n: {"json": json.dumps({"text_list": ["One."], "image_info": [{"image_base64": base64.b64encode(picture(n)).decode(), "matched_text_index": 0}]})},
    "llava_onevision": lambda n: {"json": json.dumps({"texts": ROLES, "name": ["x.jpg"]}), "0_x.jpg": picture(n)},
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_samples_of_other_tars_are_taken_down_by_image_and_cut_out(tmp_path, form):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(5):
            for name, content in OTHERS[form](number).items():
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    options = {"format": form}
    opened = lambda: open_sources({"a": SourceConfig(path=str(path), **options)}, DataConfig(), FakeProcessor())[0]
    before = opened()
    wanted = hashlib.sha256(before.stored_images(3)[0]).hexdigest()
    step = Takedown(str(path), options, images=[wanted])
    list(step.run(None))
    assert step.ledger.counts["taken down"] == 1
    assert set(opened().index.shards[0].bad) == {3}
    left = [before.stored_images(n) for n in (0, 1, 2, 4)]
    list(Takedown(str(path), options, compact=True).run(None))
    after = opened()
    assert not after.index.bad_count
    assert [after.stored_images(n) for n in range(len(after))] == left


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "takedown names nothing"),
        ({"domains": ["http://a.org"]}, "without scheme and path"),
        ({"images": ["abc"]}, "64 hexadecimal digits"),
    ],
)
def test_what_cannot_be_taken_down_is_refused(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        Takedown(str(_write(tmp_path / "shards")), {"format": "canonical"}, **options)


def test_a_packed_tar_is_not_compacted(tmp_path):
    folder = _write(tmp_path / "shards")
    packed = tmp_path / "packed" / "a.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((folder / "shard-000000.tar").read_bytes()))
    options = {"format": "canonical"}
    list(Takedown(str(packed), options, urls=["http://a.org/1"]).run(None))
    with pytest.raises(DataError, match="packed or damaged"):
        list(Takedown(str(packed), options, compact=True).run(None))


def test_a_damaged_tar_is_not_compacted(tmp_path):
    folder = _write(tmp_path / "shards")
    options = {"format": "canonical"}
    list(Takedown(str(folder), options, urls=["http://a.org/1"]).run(None))
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"key02.json")
    content[place : place + 512] = bytes(range(256)) * 2
    shard.write_bytes(content)
    with pytest.raises(DataError, match="packed or damaged"):
        list(Takedown(str(shard), options, compact=True).run(None))
    assert shard.read_bytes() == content
