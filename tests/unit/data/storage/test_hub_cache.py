"""`hf://` sources, against a Hub on loopback: revisions, the cache, and offline mode as huggingface_hub has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from m4train.data.storage.files import FileReader, find_files, stamp
from m4train.errors import DataError, M4Error
from tests.helpers.hub_server import TOKEN, connected

OLD, NEW = (
    {"a/x.tar": b"old", "a/y.tar": b"y", "c.json": b"{}"},
    {"a/x.tar": b"newer", "a/y.tar": b"y", "c.json": b"{}"},
)


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "cache") as hub:
        hub.old, hub.new = hub.add("dataset", "org/data", OLD, private=True), hub.add("dataset", "org/data", NEW)
        yield hub


def test_files_are_found_and_read_at_their_revision(hub):
    reader = FileReader()
    for place, files in ((hub.old, OLD), (hub.new, NEW), ("main", NEW)):
        found = find_files(f"hf://datasets/org/data@{place}/a/*.tar")
        assert [path.rpartition("/")[2] for path in found] == ["x.tar", "y.tar"]
        assert [reader.whole(path) for path in found] == [files["a/x.tar"], files["a/y.tar"]]
    assert find_files("hf://datasets/org/data/a/x.tar") == ["hf://datasets/org/data/a/x.tar"]
    assert reader.read("hf://datasets/org/data/a/x.tar", 1, 2) == b"ew"
    assert hub.tokens == {TOKEN, None} or hub.tokens == {TOKEN}


def test_the_stamp_changes_with_the_content(hub):
    first, second = (stamp(f"hf://datasets/org/data@{place}/a/x.tar") for place in (hub.old, hub.new))
    assert (first[0], second[0]) == (3, 5)
    assert first[1] != second[1] != ""


def test_what_the_cache_holds_is_not_fetched_again(hub, tmp_path):
    snapshot_download("org/data", repo_type="dataset", endpoint=hub.address)
    found = find_files("hf://datasets/org/data/a/*.tar")
    assert all(Path(path).is_relative_to(tmp_path / "cache") for path in found)
    hub.asked.clear()
    assert [FileReader().whole(path) for path in found] == [b"newer", b"y"]
    assert not [path for _, path in hub.asked if "resolve" in path]
    hub.add(
        "dataset", "org/data", {**NEW, "a/x.tar": b"newest"}
    )  # the cache is behind: what changed comes from the Hub
    found = find_files("hf://datasets/org/data/a/*.tar")
    assert [path.rpartition("/")[2] for path in found] == ["x.tar", "y.tar"]
    assert all(path.startswith("hf://") for path in found)
    assert FileReader().whole(found[0]) == b"newest"


def test_offline_the_cache_is_all_there_is(hub, monkeypatch, tmp_path):
    snapshot_download("org/data", repo_type="dataset", revision=hub.old, endpoint=hub.address)
    snapshot_download("org/data", repo_type="dataset", allow_patterns="c.json", endpoint=hub.address)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find_files(f"hf://datasets/org/data@{hub.old}/**/*.tar")
    assert [Path(path).read_bytes() for path in found] == [b"old", b"y"]
    with pytest.raises(
        DataError, match=r"HF_HUB_OFFLINE is set, and the cache of the Hub holds no hf://datasets/org/data/a/\*\.tar"
    ):
        find_files("hf://datasets/org/data/a/*.tar")
    assert not hub.asked


def test_a_repository_that_there_is_not(hub):
    with pytest.raises(M4Error):
        find_files("hf://datasets/org/nothing/*.tar") or stamp("hf://datasets/org/nothing/x.tar")
