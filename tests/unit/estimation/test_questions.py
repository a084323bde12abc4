"""The fourteen questions about memory that docs/estimating.md answers, each by a value of `m4train estimate --what-if --json`."""

import re
from pathlib import Path

import pytest

from m4train.estimation.changes import limits
from m4train.estimation.needs import estimate
from m4train.estimation.ranks import RankMemory
from m4train.estimation.subject import Subject
from m4train.estimation.tables import as_report
from tests.unit.estimation.test_needs import _subject

PAGE = Path(__file__).parents[3] / "docs" / "estimating.md"


def _rows():
    """(question, value of --json) of the table on the page."""
    text = PAGE.read_text(encoding="utf-8").partition("## Fourteen questions")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return [(row[0], re.findall(r"`([^`]+)`", row[2])) for row in cells[1:] if not row[0].startswith("---")]


SHARDED = {"gpu": "h100", "layers": 1, "ranks": 16, "engine": "fsdp2"}


def _quick(subject):
    """Of the right kind, and quicker than running a step for each of many changes."""
    packs = subject.config.trainer.micro_batch_size * subject.config.data.sequence_length
    parts = ("parameters", "gradients", "optimizer", "operations", "gathered", "buckets")
    return RankMemory({**dict.fromkeys(parts, 1e8), "activations": 1e5 * packs}, 0.0, True)


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(Subject, "memory", _quick)
    return as_report(estimate(_subject(**SHARDED, global_batch_size=64), variants=True))


def test_there_are_fourteen_questions_and_each_has_its_value():
    rows = _rows()
    assert [row[0].split(".")[0] for row in rows] == [str(number) for number in range(1, 15)]
    assert all(values for _, values in rows)


@pytest.mark.parametrize(("question", "values"), _rows(), ids=[row[0][:12] for row in _rows()])
def test_the_value_that_answers_a_question_is_there(question, values, report):
    changes = {" ".join(change["overrides"]): change["expected"] for change in report["what_if"]}
    for value in values:
        found = {**report, "what_if": changes}
        for key in value.split("/"):
            assert key in found, (question, value, list(found))
            found = found[key]
        assert found is not None


def test_what_still_fits_does_and_a_little_more_does_not(monkeypatch):
    monkeypatch.setattr(Subject, "memory", _quick)
    capacity = 50.0 * 2**30
    found = limits(_subject(**SHARDED, global_batch_size=64), capacity)

    def needs(**keys):
        subject = _subject(**SHARDED, micro_batch_size=keys.get("packs", 1))
        subject.config.data.sequence_length = keys.get("length", subject.config.data.sequence_length)
        return subject.memory().expected

    packs, length = found["trainer.micro_batch_size"], found["data.sequence_length"]
    assert packs > 1
    assert needs(packs=packs) <= capacity < needs(packs=packs + 1)
    assert needs(length=length) <= capacity < needs(length=length + 128)
    assert set(limits(_subject(**SHARDED), 1.0).values()) == {0}


@pytest.mark.full
def test_so_it_is_with_real_steps():
    capacity = 6.0 * 2**30
    found = limits(_subject(gpu="h100"), capacity)["trainer.micro_batch_size"]
    assert _subject(gpu="h100", micro_batch_size=found).memory().expected <= capacity
    assert _subject(gpu="h100", micro_batch_size=found + 1).memory().expected > capacity
