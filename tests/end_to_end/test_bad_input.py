"""Damaged input from end to end: dropped, named and counted, or refused; never silent, never a hang."""

import io
import json
import resource
import shutil
import sys
import tarfile

import pytest

from m4train.cli import main
from tests.end_to_end.conftest import small_run
from tests.helpers import warm

pytestmark = pytest.mark.slow


@pytest.fixture
def damaged_root(digits_root, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(digits_root, root)
    for index in root.glob("documents/*"):
        if index.suffix != ".tar":
            shutil.rmtree(index) if index.is_dir() else index.unlink()
    # The first shard with its first 100 documents, of which one pass takes seconds.
    _rewrite(
        root / "documents" / "train-000000.tar",
        lambda name, data: data if int(name.split(".")[0].rsplit("-", 1)[1]) < 100 else None,
    )
    return root


def _rewrite(shard, change):
    """Writes a shard again with each member's bytes changed by `change(name, data)`; None leaves the member out."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(shard, "w") as tar:
        for member, data in members:
            data = change(member.name, data)
            if data is not None:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _first_shard_only(m4train, root, *overrides):
    return m4train(
        "train",
        f"data.sources.documents.path={root}/documents/train-000000.tar",
        "trainer.max_steps=60",
        "trainer.log_every=20",
        "data.max_bad_fraction=0.2",
        *overrides,
        root=root,
    )


def _quarantined(tmp_path):
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    return {(entry["key"], entry["reason"]) for entry in map(json.loads, lines)}


def test_a_corrupt_image_is_dropped_and_named(m4train, damaged_root, tmp_path):
    shard = damaged_root / "documents" / "train-000000.tar"
    _rewrite(shard, lambda name, data: data[:60] if name == "train-documents-000007.0.png" else data)
    _first_shard_only(m4train, damaged_root, "data.epochs=1", "trainer.max_steps=400")
    assert {key for key, _ in _quarantined(tmp_path)} == {"train-documents-000007"}


def test_a_json_that_names_a_missing_image_is_dropped_and_named(m4train, damaged_root, tmp_path):
    shard = damaged_root / "documents" / "train-000000.tar"
    _rewrite(shard, lambda name, data: None if name == "train-documents-000004.1.png" else data)
    _first_shard_only(m4train, damaged_root, "data.epochs=1", "trainer.max_steps=400")
    assert {key for key, _ in _quarantined(tmp_path)} == {"train-documents-000004"}


def test_a_truncated_shard_trains_on_what_came_before_the_cut_and_says_so(m4train, damaged_root, tmp_path):
    shard = damaged_root / "documents" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    stats = json.loads(m4train("data stats", f"data.sources.documents.path={shard}", root=damaged_root).stdout)
    assert 0 < stats["documents"]["samples"] < 100
    bad = {"damaged_shard": 1, "no_json": 1}  # the second: of the sample that is cut, pictures are left
    assert stats["documents"]["bad"] == bad
    _first_shard_only(m4train, damaged_root, "data.epochs=1", "trainer.max_steps=400")
    assert sorted(reason for _, reason in _quarantined(tmp_path)) == sorted(bad)


def _without_room(command):
    """As on a disk that has no room for a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    sys.exit(main(command))


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(m4train, digits_root, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    m4train("train", "trainer.stop_after=5")
    full = warm.start(
        _without_room, ["train", *small_run(digits_root, tmp_path)], output=tmp_path / "full", folder=tmp_path, ready=1
    )
    assert full.wait(timeout=240) == 1
    assert "could not be written" in full.said()
    assert "Traceback" not in full.said()
    assert sorted(folder.name for folder in checkpoints.glob("step-*")) == ["step-000004", "step-000005"]
    assert not list(checkpoints.glob(".writing-*"))
    m4train("train")
    assert (checkpoints / "step-000012").is_dir()
