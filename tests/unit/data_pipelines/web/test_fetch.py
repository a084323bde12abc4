"""The step `fetch` against a server on loopback that lies, stalls, redirects and forbids."""

import hashlib
import io
import socket
import struct
import time
import zlib
from itertools import pairwise

import pytest
from PIL import Image

from data_pipelines.frame.document import image_bytes, image_node, images_of, new_document, text_node
from data_pipelines.web.fetch import Fetch
from m4train.errors import ConfigError
from tests.helpers.pipelines import picture
from tests.helpers.web_server import Site, running

PNG = picture(1)


@pytest.fixture
def site():
    return Site()


@pytest.fixture
def server(site):
    with running(site) as address:
        yield address


def document(*urls, key="k", url="http://example.org/", **metadata):
    found = new_document(key, url, {}, [text_node("text"), *(image_node(url) for url in urls)])
    found.metadata.update(metadata)
    return found


def fetched(documents, **options):
    options = {"allow_private": True, "delay": 0, "seconds": 3, "idle_seconds": 0.5, **options}
    step = Fetch(**options)
    return list(step.run(documents)), step


def statuses(*urls, **options):
    [found], _ = fetched([document(*urls)], **options)
    return [node["fetch"]["status"] for node in images_of(found)]


def test_images_come_with_their_bytes_as_they_are(site, server):
    site.add("/a.png", PNG, content_type="text/plain")  # what a server says of a type does not count
    [found], step = fetched(
        [document(f"{server}/a.png", f"{server}/none.png")], agent="tester", contact="http://me.org"
    )
    first, second = images_of(found)
    assert image_bytes(found, first) == PNG
    assert first["sha256"] == hashlib.sha256(PNG).hexdigest()
    assert (first["format"], first["width"], first["height"]) == ("png", 8, 8)
    assert first["fetch"] == {"status": "ok", "tries": 1, "code": 200}
    assert second["fetch"] == {"status": "http_404", "tries": 1, "code": 404}
    assert "sha256" not in second
    assert step.ledger.counts == {"ok": 1, "http_404": 1}
    assert site.agents == {"tester/1.0 (+http://me.org)"}


def test_what_can_go_wrong_has_a_word_of_its_own(site, server):
    site.add("/html", b"<html>not an image")
    site.add("/empty", b"")
    site.add("/cut.png", PNG[:-30], content_length=str(len(PNG)), connection="close")
    site.add("/large.png", PNG, content_length=str(10**9), connection="close")
    site.add("/grows", PNG + bytes(200_000))
    site.add("/500", b"", 503)
    site.add("/429", b"", 429, retry_after="1")
    site.add("/loop", b"", 302, location="/loop")
    site.add("/to-file", b"", 302, location="file:///etc/passwd")
    site.add("/to-ok", b"", 301, location="a.png#x")
    site.add("/a.png", PNG)

    def stalls(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(PNG[:10])
        handler.wfile.flush()
        time.sleep(1.2)

    def hangs_up(handler):
        handler.connection.shutdown(socket.SHUT_RDWR)

    site.pages |= {"/stalls": stalls, "/hangs-up": hangs_up}
    expected = {
        "/html": "not_an_image", "/empty": "not_an_image", "/cut.png": "incomplete", "/large.png": "too_large", "/grows": "too_large",
        "/500": "http_5xx", "/429": "http_429", "/loop": "too_many_redirects", "/to-file": "not_http", "/to-ok": "ok",
        "/stalls": "timeout", "/hangs-up": "connection",
    }  # fmt: skip
    urls = [server + path for path in expected]
    found = statuses(*urls, "http://no-such-host.invalid/a.png", "ftp://x/a.png", max_bytes=100_000)
    assert dict(zip(expected, found)) == expected
    assert found[-2:] == ["name_not_found", "not_http"]


def test_a_closed_port_is_a_connection_that_may_come_back():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
    assert statuses(address, respect_robots=False) == ["connection"]
    assert statuses(address) == ["robots_unreachable"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "169.254.169.254",
        "10.0.0.1",
        "[::ffff:127.0.0.1]",
        "2130706433",
        "0x7f.1",
    ],
)
def test_the_own_network_is_not_asked(site, server, host):
    site.add("/a.png", PNG)
    port = server.rpartition(":")[2]
    [found], _ = fetched([document(f"http://{host}:{port}/a.png")], allow_private=False, respect_robots=False)
    assert next(images_of(found))["fetch"]["status"] in ("private_address", "name_not_found", "not_http")
    assert not site.asked


def test_a_redirect_into_the_own_network_is_not_followed(site, server, monkeypatch):
    site.add("/a.png", PNG)
    port = server.rpartition(":")[2]
    site.add("/out.png", b"", 302, location=f"http://localhost:{port}/a.png")
    from data_pipelines.web import download

    # as if the server were outside: only its number is taken for a public one
    real = download.is_own_network
    monkeypatch.setattr(download, "is_own_network", lambda host: host != "127.0.0.1" and real(host))
    monkeypatch.setattr(
        download.Downloader, "_address_refusal", lambda self, url: "private_address" if "localhost" in url else ""
    )
    assert statuses(f"{server}/out.png", allow_private=False) == ["private_address"]
    assert site.asked["/a.png"] == 0


@pytest.mark.parametrize(
    ("rules", "path", "status"),
    [
        ("User-agent: *\nDisallow: /private*\n", "/private-a.png", "robots"),
        ("User-agent: *\nDisallow: /img/*.png$\n", "/img/a.png", "robots"),
        ("User-agent: *\nDisallow: /img/*.png$\n", "/img/a.png?x", "ok"),
        ("User-agent: *\nDisallow: /\nAllow: /a.png\n", "/a.png", "ok"),
        ("User-agent: m4train\nDisallow: /\n\nUser-agent: *\nDisallow:\n", "/a.png", "robots"),
        ("User-agent: other\nDisallow: /\n", "/a.png", "ok"),
    ],
)
def test_robots_txt_as_rfc_9309_says(site, server, rules, path, status):
    site.add("/robots.txt", rules.encode())
    site.add(path, PNG)
    assert statuses(server + path) == [status]
    assert site.asked["/robots.txt"] == 1
    assert site.asked[path] == (status == "ok")
    assert statuses(server + path, respect_robots=False) == ["ok"]


@pytest.mark.parametrize(
    ("code", "status"), [(404, "ok"), (403, "ok"), (500, "robots_unreachable"), (429, "robots_unreachable")]
)
def test_what_a_missing_or_broken_robots_txt_means(site, server, code, status):
    site.add("/robots.txt", b"User-agent: *\nDisallow: /", code)
    site.add("/a.png", PNG)
    assert statuses(*[f"{server}/a.png?{n}" for n in range(3)], f"{server}/a.png")[-1] == status
    assert site.asked["/robots.txt"] == 1  # for all images of the host


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-Robots-Tag": "noai"}, "opt_out_noai"),
        ({"X-Robots-Tag": "noindex, NoImageAI"}, "opt_out_noimageai"),
        ({"X-Robots-Tag": "otherbot: noai"}, "ok"),
        ({"X-Robots-Tag": "m4train: noindex, noai"}, "opt_out_noai"),
        ({"X-Robots-Tag": "otherbot: noindex, *: noimageai"}, "opt_out_noimageai"),
        ({"X-Robots-Tag": "unavailable_after: 25 Jun 2030, noai"}, "opt_out_noai"),
        ({"tdm-reservation": "1"}, "opt_out_tdm-reservation"),
        ({"tdm-reservation": "0"}, "ok"),
    ],
)
def test_opt_outs_of_an_image(site, server, headers, status):
    site.pages["/a.png"] = (200, headers, PNG)
    assert statuses(f"{server}/a.png") == [status]
    assert statuses(f"{server}/a.png", respect_opt_out=False) == ["ok"]


def _cbor(value):
    """Maps and texts of less than 256 bytes."""
    if isinstance(value, dict):
        return bytes([0xA0 + len(value)]) + b"".join(_cbor(part) for item in value.items() for part in item)
    data = value.encode()
    return (bytes([0x60 + len(data)]) if len(data) < 24 else bytes([0x78, len(data)])) + data


def _box(kind, content):
    return struct.pack(">I", 8 + len(content)) + kind + content


def _with_credentials(entries, by="c2pa", kind="png"):
    """An image with an assertion on training, in a JUMBF box in the chunk or segment where C2PA puts it."""
    described = _box(b"jumd", b"cbor\0\x11\0\x10\x80\0\0\xaa\0\x38\x9b\x71\x03" + f"{by}.training-mining\0".encode())
    uses = {f"{by}.{name}": {"use": use} for name, use in entries.items()}
    boxes = _box(b"jumb", described + _box(b"cbor", _cbor({"entries": uses})))
    if kind == "png":
        chunk = struct.pack(">I", len(boxes)) + b"caBX" + boxes + struct.pack(">I", zlib.crc32(b"caBX" + boxes))
        return PNG[:33] + chunk + PNG[33:]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    segment = b"JP\0\1\0\0\0\1" + boxes
    return buffer.getvalue()[:2] + b"\xff\xeb" + struct.pack(">H", 2 + len(segment)) + segment + buffer.getvalue()[2:]


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize(
    ("entries", "by", "status"),
    [
        ({"ai_training": "notAllowed"}, "c2pa", "opt_out_c2pa"),
        ({"ai_inference": "allowed", "ai_generative_training": "notAllowed"}, "cawg", "opt_out_c2pa"),
        ({"data_mining": "constrained"}, "c2pa", "opt_out_c2pa"),
        ({"ai_training": "allowed", "ai_inference": "notAllowed"}, "c2pa", "ok"),
        ({"ai_training": "allowed", "data_mining": "allowed"}, "cawg", "ok"),
    ],
)
def test_content_credentials_of_an_image(site, server, entries, by, status, kind):
    site.add("/a", _with_credentials(entries, by, kind))
    assert statuses(f"{server}/a") == [status]
    assert statuses(f"{server}/a", respect_opt_out=False) == ["ok"]


def test_what_lists_name_is_not_asked_for_and_its_pages_are_left_out(site, server, tmp_path):
    for path in ("/a.png", "/b.png", "/c.png"):
        site.add(path, PNG)
    site.add("/to-b", b"", 302, location="/b.png")
    (tmp_path / "list.txt").write_text(f"# opted out\n{server}/b.png\nListed.example  # a domain\n\n")
    urls = [f"{server}{path}" for path in ("/a.png", "/b.png", "/to-b")] + ["http://sub.listed.example:8/x.png"]
    pages = [document(*urls), document(key="gone", url="http://www.listed.example/page")]
    (found,), step = fetched(pages, refused=[str(tmp_path / "list.txt")], respect_opt_out=False)
    assert [node["fetch"]["status"] for node in images_of(found)] == ["ok", *["opt_out_listed"] * 3]
    assert step.ledger.counts["opt_out_listed_page"] == 1
    assert not site.asked["/b.png"]
    assert step.inputs() == [(str(tmp_path / "list.txt"), (tmp_path / "list.txt").stat().st_size)]
    with pytest.raises(ConfigError, match=r"fetch\.refused names .*none\.txt"):
        Fetch(refused=[str(tmp_path / "none.txt")])


def test_reservations_of_a_site(site, server):
    site.add(
        "/.well-known/tdmrep.json",
        b'[{"location": "/free/*", "tdm-reservation": 0}, {"location": "/", "tdm-reservation": 1}]',
    )
    site.add("/free/a.png", PNG)
    site.add("/a.png", PNG)
    assert statuses(f"{server}/free/a.png", f"{server}/a.png") == ["ok", "tdm_reservation"]


def test_a_page_that_forbids_training_is_left_out_and_one_that_forbids_its_images_keeps_its_text(site, server):
    site.add("/a.png", PNG)
    url = f"{server}/a.png"
    pages = [
        document(url, key="yes"),
        document(url, key="meta", meta={"robots": "noindex, noai"}),
        document(url, key="header", headers={"x-robots-tag": "noai"}),
        document(url, key="tdm", meta={"tdm-reservation": "1"}),
        document(url, key="images", meta={"robots": "noimageai"}),
    ]
    found, step = fetched(pages, drop_missing=True)
    assert [(d.id, len(list(images_of(d)))) for d in found] == [("yes", 1), ("images", 0)]
    assert step.ledger.counts == {"ok": 1, "opt_out_of_page": 3, "opt_out_of_page_images": 1}


def test_a_host_is_asked_by_few_at_once_and_with_pauses(site, server):
    def slow(handler):
        time.sleep(0.05)
        return 200, {}, PNG

    urls = [f"{server}/{n}.png" for n in range(8)]
    site.pages |= {f"/{n}.png": slow for n in range(8)}
    site.add("/robots.txt", b"User-agent: *\nCrawl-delay: 0.1\n")
    fetched([document(*urls)], per_host=1)
    starts = [when for path, when in site.times if path.endswith(".png")]
    assert min(later - sooner for sooner, later in pairwise(starts)) > 0.08
    site.most_at_once = 0
    fetched([document(*urls)], per_host=3, respect_robots=False, respect_opt_out=False)
    assert site.most_at_once == 3


def test_the_same_image_is_asked_for_once_and_documents_keep_their_order(site, server):
    def slow(handler):
        time.sleep(0.3)
        return 200, {}, PNG

    site.pages["/slow.png"] = slow
    site.add("/a.png", PNG)
    found, _ = fetched([document(f"{server}/{'slow' if n == 0 else 'a'}.png", key=str(n)) for n in range(20)])
    assert [d.id for d in found] == [str(n) for n in range(20)]
    assert site.asked["/a.png"] == 1


def test_the_second_pass_asks_only_for_what_may_succeed_and_can_be_repeated(site, server):
    site.add("/gone.png", b"", 404)
    site.add("/late.png", b"", 503)
    site.add("/a.png", PNG)
    documents, _ = fetched([document(*[f"{server}/{name}.png" for name in ("a", "late", "gone")])])
    site.add("/late.png", picture(2))
    site.asked.clear()
    documents, step = fetched(documents, retry=True)
    images = {path: number for path, number in site.asked.items() if path.endswith(".png")}
    assert images == {"/late.png": 1}
    assert [(node["fetch"]["status"], node["fetch"]["tries"]) for node in images_of(documents[0])] == [
        ("ok", 1),
        ("ok", 2),
        ("http_404", 1),
    ]
    site.asked.clear()
    again, step = fetched(documents, retry=True)
    assert not site.asked
    assert again == documents
    assert not step.ledger.counts


def test_wrong_limits_are_refused():
    with pytest.raises(ConfigError, match=r"fetch\.per_host=0"):
        Fetch(per_host=0)
    with pytest.raises(ConfigError, match="must not be below 0"):
        Fetch(delay=-1)
