"""`m4train launch check` between two processes, and what it says where something is wrong."""

import time

import pytest

from m4train.commands.preflight import Finding, _clock, _devices, _versions, preflight
from m4train.config import Config
from tests.helpers.distributed import end_ranks, start_ranks


def _check(run_dir):
    import sys

    sys.exit(preflight(Config(run_dir=run_dir)))


def _run(folder, run_dir):
    ranks = start_ranks(_check, 2, str(run_dir), folder=folder)
    try:
        return [child.wait(timeout=120) for child in ranks], [child.said() for child in ranks]
    finally:
        end_ranks(ranks)


@pytest.mark.slow
def test_two_processes_that_are_fine(tmp_path):
    codes, said = _run(tmp_path, tmp_path / "run")
    assert codes == [0, 0], said
    rows = [line.split(maxsplit=2) for line in said[0].splitlines() if line.startswith(("ok", "FAIL"))]
    assert [row[0] for row in rows] == ["ok"] * 6, said[0]
    assert [row[1] for row in rows] == ["versions", "devices", "clock", "all-reduce", "run_dir", "shared"]
    assert "2 processes on 1 host" in rows[1][2]
    assert "gloo, 64 MiB at" in rows[3][2]
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_a_run_dir_that_cannot_be_written_fails_on_every_rank(tmp_path):
    (tmp_path / "file").touch()
    codes, said = _run(tmp_path, tmp_path / "file" / "run")
    assert codes == [1, 1], said
    assert "FAIL  run_dir" in said[0]
    assert "cannot be written" in said[0]


def test_ranks_that_differ_are_named():
    now = time.time()
    fine = {"host": "a", "device": "cpu", "versions": {"torch": "2.13"}, "clock": now}
    other = {"host": "b", "device": "H100, 80 GiB", "versions": {"torch": "2.12"}, "clock": now + 60}
    assert _versions([fine, fine]) == Finding("versions", True, "torch 2.13")
    assert _versions([fine, other]).text == "torch 2.13; but rank 1 on b has {'torch': '2.12'}"
    findings = [check([fine, other]) for check in (_versions, _devices, _clock)]
    assert not any(finding.fine for finding in findings)
