"""Writing the weights of a model folder with little memory: one safetensors file after another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from m4train.models.tensor_folder import INDEX


def write_weights(
    folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, limit: int, read: Callable[[str], Tensor]
) -> None:
    """Writes the tensors that `read` gives by name, in `dtype`; see `write_files`. Raises CheckpointError through `read`."""
    size = torch.empty(0, dtype=dtype).element_size()
    sizes = {name: shape.numel() * size for name, shape in shapes.items()}
    write_files(folder, sizes, limit, lambda name: read(name).to(dtype))


def write_files(folder: Path, sizes: Mapping[str, int], limit: int, read: Callable[[str], Tensor]) -> None:
    """Writes the tensors of `sizes` bytes that `read` gives by name, as files of up to `limit` bytes and an index.

    No more than one file's tensors are held at a time. The files of an earlier save to `folder` go, once these are written.
    """
    shards = _shards(sizes, limit)
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    files = ["model.safetensors"] if count == 1 else files
    for file, names in zip(files, shards, strict=True):
        # Written aside: the tensors may be memory-mapped from the very file that is replaced.
        aside = folder / f".{file}.writing"
        save_tensors(aside, {name: read(name).contiguous().cpu() for name in names})
        os.replace(aside, folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files.append(INDEX)
    _remove_others(folder, files)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file with the mode that the umask gives; safetensors itself makes files private to their owner."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, nbytes in sizes.items():
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def _remove_others(folder: Path, written: Collection[str]) -> None:
    """Removes the weights of an earlier save: a reader would take its index, or its single file, before what is new."""
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", INDEX):
        for path in folder.glob(pattern):
            if path.name not in written:
                path.unlink()
