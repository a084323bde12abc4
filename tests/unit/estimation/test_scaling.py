"""docs/scaling.md: its figures are those that `estimate` makes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def script():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_the_page_holds_what_estimate_says():
    scaling = script()
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.page(text, scaling.table()) == text


def test_the_page_has_a_place_for_the_figures_and_a_column_for_each_size():
    scaling = script()
    text = scaling.PAGE.read_text(encoding="utf-8")
    table = text.partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert all(f"{ranks:,} x {scaling.GPU.upper()}" in table for ranks in scaling.RANKS)
    assert table.count("fits") == len(scaling.RANKS)
    assert "does not fit" not in table
