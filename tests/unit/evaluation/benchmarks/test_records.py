"""Where records come from: the hub, patterns of files, canonical shards; and what the releases hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from m4train.commands.benchmark import load_chosen, places_of
from m4train.errors import ConfigError
from m4train.evaluation.benchmarks.questions import question
from m4train.evaluation.benchmarks.records import count_records, files_of, records
from m4train.evaluation.benchmarks.spec import load_benchmark
from tests.helpers.data import write_shards
from tests.unit.evaluation.benchmarks.test_run import rows_of


def test_a_hub_id_gives_the_files_of_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's own download lays them out, from its cache."""
    asked: list[Any] = []
    for path in (
        "DocVQA/validation-0000.parquet",
        "DocVQA/test-0000.parquet",
        "InfographicVQA/validation-0000.parquet",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        pa.parquet.write_table(pa.Table.from_pylist(rows_of("docvqa")), tmp_path / path)

    def download(name: str, **given: Any) -> str:
        asked.append((name, given))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    spec = load_benchmark("docvqa")
    (place,) = places_of([spec], "hub")
    wanted = {"repo_type": "dataset", "allow_patterns": ["DocVQA/validation-*.parquet"]}
    assert asked == [("lmms-lab/DocVQA", wanted)]
    assert files_of(place) == [tmp_path / "DocVQA" / "validation-0000.parquet"]
    assert count_records(place) == len(list(records(place))) == 4
    (tmp_path / "DocVQA" / "validation-0000.parquet").unlink()
    (tmp_path / "InfographicVQA" / "validation-0000.parquet").unlink()
    with pytest.raises(ConfigError, match=r"The hub dataset lmms-lab/textvqa holds no file \*validation"):
        places_of([load_benchmark("textvqa")], "hub")


def test_a_hub_id_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="The hub dataset Lin-Chen/MMStar is neither cached nor within reach"):
        places_of([load_benchmark("mmstar")], "hub")


def conversation(row: dict[str, Any], answer: str, **more: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A record as a canonical sample, its image first."""
    content = [{"image": "0.png"}, {"text": row["question"]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"text": answer}]}]
    return {"messages": messages, **more}, {"0.png": row["image"]["bytes"]}


@pytest.mark.parametrize("name", ["textvqa", "ai2d"])
def test_canonical_shards_hold_the_same_questions(name: str, tmp_path: Path) -> None:
    rows = rows_of(name)
    if name == "textvqa":  # its ten answers are the references of the sample
        samples = [conversation(row, "?", references=row["answers"], question_id=row["question_id"]) for row in rows]
    else:  # the answer is the text of an option
        samples = [conversation(row, row["options"][int(row["answer"])], options=row["options"]) for row in rows]
    write_shards(tmp_path / "tar", [(f"k{n:03d}", *sample) for n, sample in enumerate(samples)])
    (tmp_path / "parquet").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "a.parquet")
    spec = load_benchmark(name)
    ours, theirs = (
        [question(record, folder, spec, "idefics3", n) for n, (record, folder) in enumerate(records(tmp_path / form))]
        for form in ("tar", "parquet")
    )
    assert count_records(tmp_path / "tar") == 4
    assert [(each.messages, each.references, each.options) for each in ours] == [
        (each.messages, each.references, each.options) for each in theirs
    ]
    assert [each.pictured for each in ours] == [each.pictured for each in theirs]


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("mmstar", 1500),
        ("ai2d", 3088),
        ("ocrbench", 1000),
        ("chartqa", 2500),
        ("coco_captions", 5000),
        ("flickr30k", 1000),
    ],
)
def test_the_number_of_samples_is_that_of_the_release(name: str, samples: int) -> None:
    assert load_chosen([name], None)[0].expected == samples
