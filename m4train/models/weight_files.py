"""Writing the weights of a model folder with little memory: one safetensors file after another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def write_weights(
    folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, limit: int, read: Callable[[str], Tensor]
) -> None:
    """Writes the tensors that `read` gives by name, in `dtype`, as files of up to `limit` bytes and an index.

    No more than one file's tensors are held at a time. Raises CheckpointError through `read`.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * size
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = ["model.safetensors"] if count == 1 else files
    for file, names in zip(files, shards, strict=True):
        tensors = {name: read(name).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(s.numel() for s in shapes.values()) * size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
