"""The other model families on the digits: LoRA or a run from scratch, the export, and the export in transformers' hands."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "compare_with_transformers.py"

pytestmark = pytest.mark.slow

FAMILIES = ("tiny_idefics", "tiny_idefics2")


def assert_transformers_agrees(folder: Path) -> None:
    """As the demo's script compares them: ids, fp32 logits, a greedy answer."""
    script = runpy.run_path(str(SCRIPT))
    assert script["main"](str(folder), script["_drawn_digit"]()) == 0


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("family", ["tiny_idefics", pytest.param("tiny_idefics2", marks=pytest.mark.full)])
def test_adapters_are_trained_merged_and_exported(m4train, tmp_path, family):
    run = ("experiment=digits_sft", f"model={family}", "trainer.max_steps=6", "trainer.save_every=6")
    m4train("train", *run)
    table = {row["part"]: row for row in json.loads((tmp_path / "run" / "parameters.json").read_text())}
    assert table["text"]["adapted"] > 0
    assert table["vision"]["adapted"] == table["connector"]["adapted"] == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    m4train("export", *run)
    assert_transformers_agrees(tmp_path / "run" / "export")


@pytest.mark.full
@pytest.mark.parametrize("family", [*FAMILIES, "tiny_idefics3"])
def test_a_run_from_scratch_becomes_a_transformers_model(m4train, tmp_path, family):
    run = (f"model={family}", "trainer.eval_every=12")
    m4train("train", *run)
    curve = losses(tmp_path / "run")
    assert len(curve) == 12
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    m4train("export", *run)
    assert_transformers_agrees(tmp_path / "run" / "export")
