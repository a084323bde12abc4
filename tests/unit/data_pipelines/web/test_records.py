"""WARC files whole and damaged, compared with warcio: damage costs the record it is in, and is named."""

import gzip
import io
import zlib

import pytest

from data_pipelines.web.members import cuts
from data_pipelines.web.records import Pointer, read_pointer, read_records
from m4train.errors import DataError
from tests.helpers.warcs import read_by_warcio, record, warc_of

PAGES = [
    (f"http://example.org/{number}", f"<p>page {number} of three</p>".encode() * (number + 1)) for number in range(3)
]


def read(tmp_path, data, max_bytes=1 << 20):
    path = tmp_path / "a.warc.gz"
    path.write_bytes(data)
    records = list(read_records(str(path), max_bytes))
    found: dict[str, bytes] = {}
    for one in records:
        if not one.trouble:
            found.setdefault(one.url, one.payload)
    return found, [one for one in records if one.trouble]


@pytest.mark.parametrize("packed", [True, False])
def test_records_are_those_of_warcio(tmp_path, packed):
    data = warc_of(PAGES, packed)
    found, trouble = read(tmp_path, data)
    assert found == read_by_warcio(data) == dict(PAGES)
    assert not trouble


def _places(data, packed):
    """First and last byte of each response of a WARC file."""
    return [(cut.offset, cut.offset + cut.length) for cut in cuts(io.BytesIO(data), 1 << 20)][1:]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("change", [0xFF, 0x01])
def test_damage_at_any_byte_costs_the_record_it_is_in_and_no_other(tmp_path, packed, change):
    data = warc_of(PAGES, packed)
    places = _places(data, packed)
    lost = 0
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]
        if not packed and data[place - 12 : place] == b"example.org/"[-12:]:
            continue  # no checksum covers the URL, and this one is that of another page now
        found, trouble = read(tmp_path, damaged)
        for number, (url, payload) in enumerate(PAGES):
            begin, end = places[number]
            if not begin <= place < end:
                assert found.get(url) == payload, (place, url)
        changed = {url: payload for url, payload in found.items() if dict(PAGES).get(url) != payload}
        if packed:
            assert not changed, place  # the checksum of the member shows it
        hit = next((number for number, (begin, end) in enumerate(places) if begin <= place < end), None)
        if hit is not None and PAGES[hit][0] not in found and not changed:
            lost += 1
            assert trouble or packed is False, place
        # warcio, which compares no checksum, may still give the record that was hit, but no other one more
        whole = {url for url, payload in read_by_warcio(damaged).items() if dict(PAGES).get(url) == payload}
        assert whole <= {*found, *([] if hit is None else [PAGES[hit][0]])}, place
    assert lost > len(data) // 4


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_cut_off_at_any_byte_names_the_record_that_is_not_whole(tmp_path, packed):
    data = warc_of(PAGES, packed)
    places = _places(data, packed)
    for size in range(places[0][0] + 1, len(data)):
        found, trouble = read(tmp_path, data[:size])
        whole = {PAGES[number][0] for number, (_, end) in enumerate(places) if end <= size}
        inside = any(begin < size < end for begin, end in places)
        assert whole <= set(found), size
        assert all(dict(PAGES)[url] == payload for url, payload in found.items()), size
        if inside and len(found) == len(whole):
            assert [one.trouble for one in trouble] == ["truncated"], size
    found, [cut_off] = read(tmp_path, data[: places[2][1] - 60 if packed else places[2][1] - 20])
    assert cut_off.url == PAGES[2][0]


def test_fewer_bytes_than_the_http_header_says_is_cut_off(tmp_path):
    buffer = io.BytesIO()
    from warcio.warcwriter import WARCWriter

    record(WARCWriter(buffer, gzip=True), "http://example.org/a", b"<p>half", length=4000)
    found, [cut_off] = read(tmp_path, buffer.getvalue())
    assert (cut_off.trouble, cut_off.url, found) == ("truncated", "http://example.org/a", {})


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_content_encodings_are_undone_and_bombs_are_not_unpacked(tmp_path, encoding):
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    pages = [
        ("http://example.org/a", pack(b"<p>text</p>"), ("Content-Encoding", encoding)),
        ("http://example.org/bomb", pack(b"<p>text</p>" * (1 << 20)), ("Content-Encoding", encoding)),
    ]
    found, [bomb] = read(tmp_path, warc_of(pages), 1 << 16)
    assert found == {"http://example.org/a": b"<p>text</p>"}
    assert (bomb.url, bomb.trouble) == ("http://example.org/bomb", "too_large")


@pytest.mark.parametrize("packed", [True, False])
def test_a_record_too_large_is_named_and_the_next_one_read(tmp_path, packed):
    pages = [("http://example.org/big", bytes(300_000)), *PAGES]
    found, [big] = read(tmp_path, warc_of(pages, packed), 1 << 16)
    assert (big.trouble, big.url) == ("too_large", "http://example.org/big")
    assert found == dict(PAGES)


def test_a_file_packed_as_a_whole_is_read_if_it_is_small_and_else_refused_with_the_way_out(tmp_path):
    packed = gzip.compress(warc_of(PAGES, gzip=False))
    assert read(tmp_path, packed)[0] == dict(PAGES)
    packed = gzip.compress(warc_of([(f"http://example.org/{n}", bytes(60_000)) for n in range(20)], gzip=False))
    with pytest.raises(DataError, match=r"a\.warc\.gz .*warcio recompress"):
        read(tmp_path, packed, 1 << 16)


def test_pointers_lead_to_their_records_and_say_what_else_is_there(tmp_path):
    path = tmp_path / "a.warc.gz"
    path.write_bytes(data := warc_of(PAGES))
    whole = list(read_records(str(path), 1 << 20))
    with open(path, "rb") as file:
        for one in whole:
            assert read_pointer(file, one.pointer, 1 << 20) == one
        assert read_pointer(file, Pointer(str(path), 0, whole[0].pointer.offset), 1 << 20).trouble == "no_response"
        assert read_pointer(file, Pointer(str(path), len(data), 10), 1 << 20).trouble == "truncated"
        second = whole[1].pointer
        assert read_pointer(file, Pointer(str(path), second.offset, second.length - 9), 1 << 20).trouble == "truncated"
