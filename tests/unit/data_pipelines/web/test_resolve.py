"""The step `resolve`: bytes from WARC records, local folders, and the output of img2dataset."""

import io
import json
import tarfile

import pytest

from data_pipelines.frame.document import image_bytes, image_node, images_of, new_document
from data_pipelines.frame.step import Place
from data_pipelines.web.resolve import Resolve
from m4train.errors import ConfigError, DataError
from tests.helpers.pipelines import picture
from tests.helpers.warcs import warc_of


def document(*urls):
    return new_document("k", "http://example.org/", {}, [image_node(url) for url in urls])


def resolved(urls, **options):
    step = Resolve(**options)
    [found] = step.run([document(*urls)])
    return [
        (node["fetch"]["status"], image_bytes(found, node) if node.get("sha256") else None) for node in images_of(found)
    ]


def img2dataset(path, samples):
    with tarfile.open(path, "w") as tar:
        for number, (url, content, status) in enumerate(samples):
            files = {"json": json.dumps({"url": url, "status": status}).encode(), "txt": b"caption"}
            files |= {"jpg": content} if content is not None else {}
            for kind in sorted(files, reverse=number % 2 == 0):
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(files[kind])
                tar.addfile(member, io.BytesIO(files[kind]))


def test_warc_records(tmp_path):
    pages = [
        ("http://e.org/page", b"<p>page", ("Content-Type", "text/html")),
        ("http://e.org/a.png", picture(1), ("Content-Type", "image/png")),
        ("http://e.org/b.png", b"no image", ("Content-Type", "image/png")),
    ]
    (tmp_path / "a.warc.gz").write_bytes(warc_of(pages))
    urls = ["http://e.org/a.png", "http://e.org/b.png", "http://e.org/none.png"]
    found = resolved(urls, warc=[str(tmp_path / "*.warc.gz")])
    assert found == [("ok", picture(1)), ("not_an_image", None), ("not_stored", None)]


def test_folders_and_nothing_outside_of_them(tmp_path):
    (tmp_path / "site" / "img").mkdir(parents=True)
    (tmp_path / "site" / "img" / "a b.png").write_bytes(picture(1))
    (tmp_path / "secret.png").write_bytes(picture(2))
    (tmp_path / "site" / "link.png").symlink_to(tmp_path / "secret.png")
    urls = [
        "http://e.org/x/img/a%20b.png?v=2",
        "http://e.org/x/../secret.png",
        "http://e.org/x/%2e%2e/secret.png",
        "http://e.org/x/link.png",
    ]
    found = resolved(urls, folders={"http://e.org/x/": str(tmp_path / "site")})
    assert found == [("ok", picture(1)), *[("not_stored", None)] * 3]


def test_img2dataset(tmp_path):
    samples = [
        ("http://e.org/a.jpg", picture(1), "success"),
        ("http://e.org/b.jpg", None, "failed_to_download"),
        ("http://e.org/c.jpg", picture(3), "success"),
    ]
    img2dataset(tmp_path / "00000.tar", samples)
    found = resolved([url for url, _, _ in samples], img2dataset=[str(tmp_path / "*.tar")])
    assert found == [("ok", picture(1)), ("not_stored", None), ("ok", picture(3))]
    (tmp_path / "bad.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"bad\.tar is not a tar file of img2dataset"):
        resolved(["http://e.org/a.jpg"], img2dataset=[str(tmp_path / "bad.tar")])


def test_ranks_of_a_pipeline_look_once(tmp_path, monkeypatch):
    (tmp_path / "a.warc.gz").write_bytes(warc_of([("http://e.org/a.png", picture(1), ("Content-Type", "image/png"))]))
    for rank in range(2):
        step = Resolve(warc=[str(tmp_path / "a.warc.gz")])
        step.place = Place(tmp_path, "images")
        list(step.run([document("http://e.org/a.png")], rank, 2))
        assert step.ledger.counts == {"ok": 1}
        monkeypatch.setattr(Resolve, "_looked_up", None)  # not called by the second one


def test_missing_images_can_be_taken_out(tmp_path):
    step = Resolve(folders={"http://e.org/": str(tmp_path)}, drop_missing=True)
    [found] = step.run([document("http://e.org/a.png")])
    assert not list(images_of(found))


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs warc, folders or img2dataset"):
        Resolve()
    with pytest.raises(ConfigError, match="matches no file"):
        Resolve(warc=[str(tmp_path / "*.warc.gz")])
    with pytest.raises(ConfigError, match="is not a folder"):
        Resolve(folders={"http://e.org/": str(tmp_path / "none")})
