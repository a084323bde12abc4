"""All steps between extraction and shards in one pipeline, killed in the middle of each stage: it goes on to the same bytes."""

import json

import pytest

from data_pipelines.corpus.report import REPORT
from tests.helpers.corpus import run_stages
from tests.helpers.pipelines import digests

RULES = {"image": {"width": [8, 100]}, "paragraph": {"words": [3, 50]}, "document": {"images": [1, 3]}}
SAME = {"rules": {"url": True, "image": 12, "paragraph": 8, "minhash": True}, "buckets": 4}
PAGES = [
    [n, [f"Page {n % 40} is about the number {n % 40} and nothing else.", f"png:{n % 7}", "Shared footer of all."], f"http://s{n % 3}.org/{n % 40}", {"date": f"20{10 + n % 9}"}]
    for n in range(90)
]  # fmt: skip
STAGES = ("filter", "keys", "dedup", "write")


def _stages(once="", where=""):
    """Two that nothing is killed in have the step, too: the configurations, and with them the bytes, are to be compared."""
    killed = lambda stage: {
        "killed": {
            "step": "tests.helpers.corpus:Killed",
            "once": f"{once}-{stage}",
            "at": 5 if stage == where else 10**6,
        }
    }
    return {
        "filter": {"steps": {"filter": {"rules": RULES}} | killed("filter")},
        "keys": {"steps": {"keys": SAME} | killed("keys"), "keep": False},
        "buckets": {"steps": {"buckets": SAME}, "keep": False, "reads": None},
        "dedup": {"steps": {"dedup": SAME} | killed("dedup")},
        "write": {"steps": {"write": {"validation": 0.2, "max_samples": 5}} | killed("write"), "keep": False},
        "seal": {"steps": {"seal": {}}, "keep": False, "reads": None, "tasks": 1},
        "report": {"steps": {"report": {}}, "keep": False, "reads": None, "tasks": 1},
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_stages(folder, PAGES, _stages(str(folder / "once"))) == 0
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_pipeline_that_is_killed_inside_a_stage_ends_with_the_same_bytes_and_numbers(tmp_path, whole, stage, capsys):
    stages = _stages(str(tmp_path / "once"), stage)
    assert run_stages(tmp_path, PAGES, stages, "executor.workers=2") == 1
    assert "ended by signal 9" in " ".join(capsys.readouterr().err.split())
    assert run_stages(tmp_path, PAGES, stages) == 0
    out = tmp_path / "out"
    for pattern in ("*/documents-*", "*/images-*", "write/shards/*.tar", "write/provenance/*"):
        assert digests(out, pattern) == digests(whole, pattern)
    assert digests(out, "write/shards/*.tar")
    sealed = [json.loads((root / "write" / "dataset.json").read_text()) for root in (out, whole)]
    assert [each["counts"] for each in sealed[:1]] == [each["counts"] for each in sealed[1:]]
    assert sealed[0]["shards"] == sealed[1]["shards"]
    assert (out / REPORT).read_text() == (whole / REPORT).read_text()
