"""Every form of records, stored as JSON lines, as a JSON array and as parquet: the right texts, and the right pixels in their places."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from m4train.config import SourceConfig
from m4train.data.source import build_sources
from tests.helpers.data import FakeProcessor, data_config, digit_pictures
from tests.unit.data.sources.test_records import FORMS, A, B, Pic

PATHS = {A: digit_pictures()[0][0], B: digit_pictures()[0][1]}


def fits(name: str, kind: str) -> bool:
    """Whether a file of this kind can hold the record: JSON no bytes, a column of parquet no values of several types."""
    try:
        json.dumps(FORMS[name][0]) if kind != "parquet" else pyarrow.Table.from_pylist([FORMS[name][0]])
    except (TypeError, pyarrow.ArrowException):
        return False
    return True


STORED = [(name, kind) for name in FORMS for kind in ("jsonl", "json", "parquet") if fits(name, kind)]


def test_most_forms_can_be_stored_in_every_kind_of_file() -> None:
    for kind in ("jsonl", "json", "parquet"):
        assert sum(each == kind for _, each in STORED) > 0.8 * len(FORMS)


@pytest.mark.parametrize(("name", "kind"), STORED)
def test_a_stored_form(tmp_path: Path, name: str, kind: str) -> None:
    record, expected = FORMS[name]
    for path, image in PATHS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / path, "png")
    file = tmp_path / f"r.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), file)
    else:
        file.write_text(json.dumps(record) + "\n" if kind == "jsonl" else json.dumps([record]))
    config = SourceConfig(path=str(file), format="auto")
    [built] = build_sources({"s": config}, data_config(), FakeProcessor())
    pixels = built.images(0)
    sample = built.read(0)
    flat: list[Any] = []
    for item in sample.all_items():
        flat.append(
            item["text"] if "text" in item else np.asarray(pixels[len([x for x in flat if not isinstance(x, str)])])
        )
    wanted = [part for each in expected for part in (each[1] if isinstance(each, tuple) else [each])]
    wanted = [np.asarray(PATHS[str(part)].convert("RGB")) if isinstance(part, Pic) else part for part in wanted]
    assert len(flat) == len(wanted), flat
    assert all(np.array_equal(x, y) if isinstance(y, np.ndarray) else x == y for x, y in zip(flat, wanted)), flat
    if sample.messages is not None:
        assert [m["role"] for m in sample.messages] == [role for role, _ in expected]
