"""benchmarks/gpu.py at sizes that a CPU computes: only they differ on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu


def results(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--scale", "tiny", "--seconds", "0.01", "--out", str(out), *arguments])
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["idefics3_8b_lora", pytest.param("idefics2_8b_lora", marks=pytest.mark.full)])
def test_both_sides_of_a_case(case: str, tmp_path: Path) -> None:
    found = results(tmp_path, "--cases", case, "--lengths", "128", "--no-data", "--no-compile")
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == {f"{case} 128 {side}" for side in ("m4train", "transformers sdpa", "m4train kernels")}
    for side in ("m4train", "transformers sdpa"):
        row = rows[f"{case} 128 {side}"]
        assert row["tokens_per_second"] == pytest.approx(128 / row["step_seconds"])
        assert row["images_per_second"] > 0
    mine = rows[f"{case} 128 m4train"]
    assert mine["estimated_gib"] > 0
    assert mine["tflops"] > 0
    shares = [share for _, share in rows[f"{case} 128 m4train kernels"]["kernels"]]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert list(found["left_out"]) == [f"{case} 128 transformers flash_attention_2"]


@pytest.mark.full
def test_all_cases_compiled_and_with_data(tmp_path: Path) -> None:
    found = results(tmp_path, "--no-peers", "--lengths", "128", "--minutes", "30")
    assert not found["left_out"]
    names = [row["name"] for row in found["rows"]]
    assert len(names) == 3 * len(gpu.CASES) + 1
    assert 0 <= found["rows"][names.index("data of a run")]["data_wait_fraction"] <= 1


def test_what_there_is_no_time_for_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path, "--cases", "smolvlm_256m_full", "--lengths", "128", "--minutes", "0.001")
    assert found["rows"] == []
    assert len(found["left_out"]) == 6  # among them the data of a run
    assert "left out: smolvlm_256m_full 128 m4train: needs about 1 s, more than is left" in capsys.readouterr().out


@pytest.mark.parametrize("case", gpu.CASES)
def test_packed_and_padded_hold_the_same(case: str, tmp_path: Path) -> None:
    options = type("Options", (), {"device": "cpu", "scale": "tiny"})
    made = gpu.Case(case, 256, options)
    batch, padded = made.packed(), list(made.padded())
    assert batch.tokens == made.tokens == sum(int(each["attention_mask"].sum()) for each in padded) == 256
    assert batch.loss_tokens == sum(int((each["labels"][:, 1:] != -100).sum()) for each in padded)
    seen = sum(int(each["pixel_attention_mask"].flatten(2).any(-1).sum()) for each in padded)
    assert batch.images is not None
    assert batch.images.count == made.images == seen > 0
    images = sum(int((each["input_ids"] == made.image_id).sum()) for each in padded)
    assert images == len(batch.image_positions) == made.images * made.architecture.tokens_per_image
    assert torch.equal(batch.input_ids[batch.image_positions], torch.full((images,), made.image_id))
