"""RICES: the answered samples whose images are most like that of the question, by embeddings that are stored or made here.

`NAME.npz` holds `support` (S, D) and `queries` (Q, D), a row for each record of both sets, in stored order; as Idefics was measured,
those are of CLIP. Without such a file the model's own vision tower makes them, as the mean of an image's features, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m4train.errors import ConfigError
from m4train.evaluation.benchmarks.records import count_records, records

OWN = "own tower"


def similar_shots(name: str, queries: Path, support: Path, setting: Any, ask: Any) -> Callable[[int, int], list[int]]:
    """(number of a question, count) -> the numbers of its shots in the support set, the most similar one last.

    Embeddings are those of `setting.rices`/NAME.npz, which rank 0 makes if it is not there or is another model's. All ranks call
    it. Raises ConfigError for embeddings that do not fit the records.
    """
    path, engine = setting.rices / f"{name}.npz", setting.engine
    wanted = (count_records(queries), count_records(support))
    if engine.broadcast(_to_make(path, setting.name) if engine.rank == 0 else None):
        if engine.sharded:
            raise ConfigError(
                f"{path} is not there, and a vision tower that ranks share makes none: run once with engine=single or ddp, or "
                "store embeddings there."
            )
        if engine.rank == 0:
            _make(path, setting, *(_images(place, ask) for place in (queries, support)))
        engine.barrier()
    found = _read(path)
    for key, count in zip(("queries", "support"), wanted):
        if found[key].ndim != 2 or len(found[key]) != count:
            raise ConfigError(
                f"{path} holds {key} of shape {found[key].shape}, but there are {count} records: embed them again."
            )
    if found["queries"].shape[1] != found["support"].shape[1]:
        raise ConfigError(
            f"{path} holds embeddings of {found['queries'].shape[1]} and {found['support'].shape[1]} values."
        )
    asked, given = _unit(found["queries"]), _unit(found["support"])
    return lambda number, count: np.argsort(given @ asked[number], kind="stable")[-count:].tolist()


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path} cannot be read as embeddings ({error}): store queries and support with numpy.savez."
        ) from error


def _to_make(path: Path, model: str) -> bool:
    """Whether embeddings are missing, or were made by another model's tower."""
    if not path.is_file():
        return True
    found = _read(path)
    if not {"queries", "support"} <= found.keys():
        raise ConfigError(f"{path} holds {', '.join(found)}, but must hold queries and support.")
    return OWN in found and str(found[OWN]) != model


def _unit(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _images(place: Path, ask: Any) -> Iterator[list[Any]]:
    return (ask(record, folder, number).images for number, (record, folder) in enumerate(records(place)))


def _make(path: Path, setting: Any, queries: Iterator[list[Any]], support: Iterator[list[Any]]) -> None:
    made = {key: _embedded(setting, images) for key, images in (("queries", queries), ("support", support))}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}.writing.npz")
    named: dict[str, Any] = {**made, OWN: np.array(setting.name)}
    np.savez(aside, **named)
    os.replace(aside, path)


@torch.no_grad()
def _embedded(setting: Any, samples: Iterator[list[Any]]) -> np.ndarray:
    """(samples, D) the mean feature of each sample's images; zeros for one without."""
    rows: list[np.ndarray] = []
    while batch := list(islice(samples, setting.batch_size)):
        for images in batch:
            rows.append(_feature(setting, images) if images else np.zeros(0))
    size = max((len(row) for row in rows), default=0)
    return np.stack([row if len(row) else np.zeros(size) for row in rows])


def _feature(setting: Any, images: list[Any]) -> np.ndarray:
    inputs = setting.processor.image_processor([images], return_tensors="pt")
    device, names = setting.engine.device, ("pixel_values", "pixel_attention_mask")
    given = {name: inputs[name].to(device) for name in names if name in inputs}
    return setting.model.get_image_features(**given).float().flatten(0, -2).mean(0).cpu().double().numpy()
