"""Tar files made to do harm: each costs bounded time, and is a damaged shard or a bad sample by name; the rest is read."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path

import pytest

from m4train.config import SourceConfig
from m4train.data.source import open_sources
from m4train.data.sources.tarfiles import BLOCK, TarMember, walk_tar
from m4train.data.storage.files import FileReader
from tests.helpers.data import FakeProcessor, data_config, page_picture, png

PICTURE = png(page_picture("a"))
SAMPLE = json.dumps({"items": [{"image": "0.png"}, {"text": "A page."}]}).encode()
SECONDS = 20.0  # each takes well below one; a loop would take for ever


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header whose size field holds these 12 bytes, with the right checksum."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148] = size.ljust(12, b"\0"), b"00000000000\0"
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def octal(size: int) -> bytes:
    return f"{size:011o}\0".encode()


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name.encode(), octal(len(data)), kind) + data + bytes(-len(data) % BLOCK)


def pax(records: bytes) -> bytes:
    return member("pax", records, b"x")


def sample(key: str) -> bytes:
    return member(f"{key}.json", SAMPLE) + member(f"{key}.0.png", PICTURE)


END = bytes(2 * BLOCK)
CRAFTED = {
    "negative base-256 size": header(b"a.json", b"\xff" * 12),
    "negative octal size": header(b"a.json", b"-0000000010"),
    "size with a sign": header(b"a.json", b"+0000000010"),
    "size in letters": header(b"a.json", b"zzzzzzzzzzz"),
    "size with underscores": header(b"a.json", b"1_0"),
    "base-256 size of 2**88": header(b"a.json", b"\x80" + b"\xff" * 11),
    "octal size above the file": header(b"a.json", octal(8**10)),
    "pax length of 5,000 digits": pax(b"9" * 5000 + b" path=a\n"),
    "pax length of zero": pax(b"0 path=a\n" * 10),
    "pax length above the records": pax(b"999 path=a\n"),
    "pax size of 5,000 digits": pax(b"5014 size=" + b"9" * 5003 + b"\n") + member("a.json", SAMPLE),
    "pax size above the file": pax(b"22 size=999999999999\n") + member("a.json", SAMPLE),
    "pax size below zero": pax(b"12 size=-10\n") + member("a.json", SAMPLE),
    "pax records of 8 MB": pax(b"8 k=abc\n" * (1 << 20)),
    "a million tiny pax records": pax(b"6 k=a\n" * 170_000),
    "a name of 8 MB": member("long", b"n" * (8 << 20), b"L"),
    "names before names": member("long", b"a.json\0", b"L") * 5000,
    "ten thousand torn headers": (b"ustar".rjust(262, b"x") + bytes(250)) * 10_000,
    "every second block torn": (header(b"a.json", octal(0)) + b"x" * BLOCK) * 4000,
    "the same key ten thousand times": member("a.json", b"{}") * 10_000,
    "a device, a link, a folder": b"".join(
        header(b"a.json", octal(0), kind) for kind in (b"1", b"2", b"3", b"5", b"S")
    ),
    "names that climb": member("../../../etc/passwd.json", SAMPLE) + member("../../../etc/passwd.0.png", PICTURE),
    "names that are not UTF-8": header(b"\xff\xfe.json", octal(0)),
    "an empty name": header(b"", octal(0)),
    "200,000 items": member("big.json", json.dumps({"items": [{"text": "a"}] * 200_000}).encode()),
    "200,000 images": member("big.json", json.dumps({"items": [{"image": "0.png"}, {"text": "a"}] * 100_000}).encode()),
    "200,000 turns": member(
        "big.json",
        json.dumps(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 100_000}
        ).encode(),
    ),
    "json of 5,000 nested lists": member("deep.json", b"[" * 5000 + b"]" * 5000),
    "a number of 10,000 digits": member("digits.json", b'{"items": [{"text": "a"}], "score": ' + b"9" * 10_000 + b"}"),
}


LEGITIMATE = {  # odd, but what they hold is what they say
    "a million tiny pax records",
    "names before names",
    "a device, a link, a folder",
    "names that climb",
    "names that are not UTF-8",
    "an empty name",
    "a number of 10,000 digits",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_shard_costs_little_and_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(sample("past") + CRAFTED[name] + sample("good") + END)
    begun = time.monotonic()
    [source] = open_sources({"s": SourceConfig(path=str(tmp_path / "a.tar"))}, data_config(), FakeProcessor())
    assert time.monotonic() - begun < SECONDS
    keys = [source.key(number) for number in range(len(source))]
    bad = dict(source.index.shards[0].bad)
    assert "past" in keys
    assert keys.index("past") not in bad
    after = [number for number, key in enumerate(keys) if key == "good"]
    assert after or len(bad) >= 1, (keys, bad)
    for number in after:
        if number not in bad:
            assert source.images(number)[0].size == page_picture("a").size
    if name not in LEGITIMATE:
        assert bad, "nothing said"
    for reason, detail in bad.values():
        assert reason
        assert len(detail) < 2000


def test_a_pax_size_is_the_size(tmp_path: Path) -> None:
    """Tar keeps sizes that its header has no place for in pax records."""
    (tmp_path / "a.tar").write_bytes(pax(b"13 size=1024\n") + header(b"b.json", octal(0)) + bytes(1024) + END)
    assert list(walk_tar(FileReader(), str(tmp_path / "a.tar"))) == [TarMember("b.json", 3 * BLOCK, 1024)]


def test_a_long_name_in_pax_records_is_the_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tar", mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a" * 120 + "\u00e9.json")
        info.size = len(SAMPLE)
        tar.addfile(info, io.BytesIO(SAMPLE))
    [found] = walk_tar(FileReader(), str(tmp_path / "b.tar"))
    assert (found.name, found.size) == (info.name, len(SAMPLE))
