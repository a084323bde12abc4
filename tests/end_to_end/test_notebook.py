"""The notebook of the documentation runs from the top to the end, and shows masks, curves and answers."""

import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs nbclient, which runs notebooks")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat, which reads notebooks")
pytest.importorskip("ipykernel", reason="needs ipykernel, which runs the cells of notebooks")

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    masks, curves, answers = shown
    assert "trained on" in masks
    assert masks.count("data-original=") >= 4
    assert "&lt;svg" in curves
    assert "Held-out answers" in answers
    said = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
    first, best = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert best < 0.3 * first
    assert (tmp_path / "runs" / "shapes" / "export" / "config.json").is_file()
