import json
from pathlib import Path

import pytest

from m4train.data.loading.quarantine import Quarantine, QuarantineEntry
from m4train.errors import DataError


def entry(number: int, reason: str = "damaged") -> QuarantineEntry:
    return QuarantineEntry(1, 2, "pages", f"doc{number}", "a.tar", reason, "broken")


def test_each_sample_is_written_once_over_epochs_and_restarts_but_always_counted(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(path, 0.5)
    first.add([entry(0), entry(1)], 10)
    first.add([entry(0)], 10)
    assert first.counts[("pages", "damaged")] == 3
    Quarantine(path, 0.5).add([entry(1), entry(2)], 10)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["doc0", "doc1", "doc2"]
    assert lines[0]["reason"] == "damaged"
    assert lines[0]["shard"] == "a.tar"


def test_a_line_that_a_kill_left_unfinished_is_cut_off_and_its_sample_written_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 0.5).add([entry(0), entry(1)], 10)
    path.write_text(path.read_text()[:-20])
    Quarantine(path, 0.5).add([entry(0), entry(1)], 10)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["doc0", "doc1"]


def test_too_many_bad_samples_stop_the_run_but_those_left_out_by_choice_do_not(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.1)
    quarantine.add([entry(n, "too_long") for n in range(500)], 100)
    quarantine.add([entry(n) for n in range(49)], 0)
    with pytest.raises(DataError, match="max_bad_fraction"):
        quarantine.add([entry(99)], 0)
