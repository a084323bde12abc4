"""A folder as a WARC file, which warcio reads too, and served on loopback."""

import urllib.request

import pytest

from data_pipelines.web.records import read_records
from data_pipelines.web.wrap import main, served, wrap
from m4train.errors import DataError
from tests.helpers.pipelines import picture
from tests.helpers.warcs import read_by_warcio


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site" / "img").mkdir(parents=True)
    (tmp_path / "site" / "a b.html").write_text("<p>page")
    (tmp_path / "site" / "img" / "a.png").write_bytes(picture(1))
    (tmp_path / "site" / "notes.txt").write_text("not wrapped")
    return tmp_path / "site"


def test_a_folder_becomes_records_and_the_same_folder_the_same_bytes(site, tmp_path):
    assert wrap(site, tmp_path / "a.warc.gz") == 2
    content = (tmp_path / "a.warc.gz").read_bytes()
    expected = {"http://docs.example/a%20b.html": b"<p>page", "http://docs.example/img/a.png": picture(1)}
    assert read_by_warcio(content) == expected
    assert {one.url: one.payload for one in read_records(str(tmp_path / "a.warc.gz"), 1 << 20)} == expected
    assert wrap(site, tmp_path / "b.warc.gz") == 2
    assert (tmp_path / "b.warc.gz").read_bytes() == content
    assert wrap(site, tmp_path / "c.warc.gz", pages_only=True) == 1


def test_served(site):
    with served(site) as address:
        assert urllib.request.urlopen(address + "img/a.png", timeout=10).read() == picture(1)


def test_the_command(site, tmp_path, capsys):
    assert main([str(site), str(tmp_path / "a.warc.gz"), "http://e.org/"]) == 0
    assert "2 responses" in capsys.readouterr().out
    assert main([str(tmp_path / "none"), str(tmp_path / "a.warc.gz")]) == 1
    assert "holds no page" in capsys.readouterr().err
    assert main([]) == 2
    with pytest.raises(DataError, match="holds no page"):
        wrap(site / "img", tmp_path / "d.warc.gz")
