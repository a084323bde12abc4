"""Weights written one file after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m4train.models.tensor_folder import TensorFolder
from m4train.models.weight_files import write_weights


@pytest.mark.parametrize("limits", [(40, 1000), (1000, 40), (40, 80)])
def test_weights_written_over_others_are_the_ones_read(limits: tuple[int, int], tmp_path: Path) -> None:
    shapes = {name: torch.Size((10,)) for name in "abcd"}
    for value, limit in enumerate(limits):
        write_weights(tmp_path, shapes, torch.float32, limit, lambda _, value=value: torch.full((10,), float(value)))
    stored = TensorFolder(tmp_path)
    assert stored.files.keys() == shapes.keys()
    assert all(torch.equal(stored[name], torch.ones(10)) for name in shapes)
    files = {path.name for path in tmp_path.iterdir()}
    assert files - {"model.safetensors.index.json"} == set(stored.files.values())
