"""benchmarks/gpu.py at sizes that a CPU computes: only they differ on a GPU."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu


def results(tmp_path: Path, part: str, *arguments: str) -> dict[str, Any]:
    """What one part finds in this process."""
    out = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--scale", "tiny", "--seconds", "0.01", "--out", str(out), "--part", part, *arguments]
    gpu.main(given)
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["idefics3_8b_lora", *(pytest.param(name, marks=pytest.mark.full) for name in list(gpu.CASES)[1:])]
)
def test_both_sides_of_a_case(case: str, tmp_path: Path) -> None:
    """At both lengths, compiled by the test of all parts; what cannot be done is named."""
    found = results(tmp_path, case, "--no-compile")
    rows = {row["name"]: row for row in found["rows"]}
    quantised = "qlora" in case
    sides = ("m4train",) if quantised else ("m4train", "transformers sdpa")
    both = [(side, length) for side in sides for length in (128, 256)]
    assert rows.keys() == {f"{case} {length} {side}" for side, length in both} | {f"{case} 128 m4train kernels"}
    for side, length in both:
        row = rows[f"{case} {length} {side}"]
        assert row["tokens_per_second"] == pytest.approx(length / row["step_seconds"])
        assert row["images_per_second"] > 0
        assert ("tflops" in row) == (side == "m4train")
    assert rows[f"{case} 256 m4train"]["tflops"] > 0
    shares = [share for _, share in rows[f"{case} 128 m4train kernels"]["kernels"]]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    refused = ("transformers sdpa",) * quantised + ("transformers flash_attention_2",)
    assert list(found["left_out"]) == [f"{case} {length} {side}" for side in refused for length in (128, 256)]
    assert "the package flash-attn is not installed" in found["left_out"][f"{case} 256 {refused[-1]}"]


@pytest.mark.full
def test_all_cases_compiled_and_with_data(tmp_path: Path) -> None:
    for part in (*gpu.CASES, gpu.DATA, gpu.ESTIMATES):
        found = results(tmp_path, part, "--no-peers", "--lengths", "128", "--minutes", "30")
        assert not found["left_out"]
        names = {row["name"].removeprefix(f"{part} 128 "): row for row in found["rows"]}
        if part == gpu.ESTIMATES:
            assert names.keys() == {f"{case} 128 estimate" for case in gpu.CASES}
            assert all(row["estimated_gib"] > 0 for row in names.values())
        elif part == gpu.DATA:
            assert 0 <= names["data of a run"]["data_wait_fraction"] <= 1
        else:
            assert names.keys() == {"m4train", "m4train kernels", "m4train compiled"}


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    found = results(tmp_path, "smolvlm_256m_full", "--lengths", "128", "--minutes", "0.001")
    assert found["rows"] == []
    sides = ("m4train", "transformers sdpa", "m4train compiled", "transformers flash_attention_2")
    assert list(found["left_out"]) == [f"smolvlm_256m_full 128 {side}" for side in sides]
    assert set(found["left_out"].values()) == {"needs about 1 s, more than is left"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "OutOfMemoryError: CUDA out of memory. Tried"),
        (
            RuntimeError("CUDA error: unspecified launch failure"),
            "RuntimeError: CUDA error: unspecified launch failure",
        ),
        (ImportError("no flash"), "ImportError: no flash"),
    ],
)
def test_what_fails_at_one_length_of_one_side_loses_nothing_else(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Side:
        def __init__(self, *given: Any) -> None:
            pass

        def compiled(self) -> Side:
            return self

        def step(self, case: gpu.Case) -> Any:
            def run() -> torch.Tensor:
                if case.length == 256:
                    raise error
                return torch.ones(())

            return run

        def described(self, *given: Any) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(gpu, "Ours", Side)
    monkeypatch.setattr(gpu, "Theirs", Side)
    monkeypatch.setattr(gpu, "top_kernels", lambda *_: [])
    found = results(tmp_path, "smolvlm_256m_full")
    names = [row["name"].removeprefix("smolvlm_256m_full ") for row in found["rows"]]
    sides = ("m4train", "transformers sdpa", "m4train compiled", "transformers flash_attention_2")
    assert names == ["128 m4train", "128 m4train kernels", *(f"128 {side}" for side in sides[1:])]
    assert found["left_out"] == {f"smolvlm_256m_full 256 {side}": said for side in sides}


STUB = """import json, os, sys, time
part, out = sys.argv[1:]
json.dump({"device": "stub", "rows": [{"name": part}], "left_out": {part + " x": "why"}}, open(out, "w"))
if part == "smolvlm_256m_full": sys.exit("a driver\\nthe last line")
if part == "smolvlm_2b_full": os.abort()
if part == "idefics3_8b_qlora": time.sleep(600)
"""


def test_a_process_that_dies_takes_nothing_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "command", lambda part, until, out, given: [sys.executable, "-c", STUB, part, out])
    out, cases = tmp_path / "gpu.json", list(gpu.CASES)[:4]
    gpu.main(["--minutes", "60", "--out", str(out), "--cases", *cases])
    found = json.loads(out.read_text(encoding="utf-8"))
    parts = [*cases, gpu.DATA, gpu.ESTIMATES]
    assert [row["name"] for row in found["rows"]] == parts
    assert found["device"] == "stub"
    left_out = found["left_out"]
    assert left_out["smolvlm_256m_full"] == "its process ended with status 1 (the last line)"
    assert left_out["smolvlm_2b_full"].startswith("its process ended with status -6")
    assert set(left_out) == {*(f"{part} x" for part in parts), *cases[1:3]}
    assert "left out: smolvlm_256m_full: its process ended" in capfd.readouterr().out


def test_a_process_that_hangs_is_killed_at_the_end_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "command", lambda part, until, out, given: [sys.executable, "-c", STUB, part, out])
    _, failed = gpu.Part("idefics3_8b_qlora", 0.5, []).found()
    assert failed is not None
    assert failed.startswith("hung, and was killed after its ")


def test_the_command_of_a_part_measures_that_part_until_its_end(tmp_path: Path) -> None:
    given = ["--device", "cpu", "--out", "mine.json", "--minutes", "3"]
    words = gpu.command("data", 12.5, "found.json", given)
    assert words[1] == gpu.__file__
    assert words[2:] == [*given, "--part", "data", "--until", "12.5", "--out", "found.json"]


def test_it_needs_nothing_of_the_repository_but_what_is_installed() -> None:
    """So that a copy of the file runs anywhere."""
    imported = set()
    for node in ast.walk(ast.parse(Path(gpu.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    own = imported - sys.stdlib_module_names
    assert own == {"m4train", "data_pipelines", "torch", "numpy", "PIL", "transformers", "peft"}


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
