"""`report`: one offline HTML page of a pipeline: its funnel, what was dropped next to what was kept, and histograms with thresholds.

The numbers are those of all ranks that are done, in whatever attempt: a stage that is not finished says how many those are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from jinja2 import Environment, FileSystemLoader

import m4train
from data_pipelines.corpus.histogram import histogram
from data_pipelines.frame.manifest import MANIFEST
from data_pipelines.frame.rank import missing_ranks
from data_pipelines.frame.runner import PIPELINE
from data_pipelines.frame.statistics import Ledger, merged
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import aside
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.images import data_uri, decode_image

REPORT = "report.html"
KEPT = "kept"
_SIZES = ("documents", "images", "words")
_IMAGES = 4  # of an example that are shown
_SIDE = 280  # pixels of the longer side of one: twice what is shown, for screens that are finer
_PARTS = ("image", "paragraph", "document")  # in the order in which `filter` applies its rules


class Report(Step):
    """Writes `report.html` in the folder of a pipeline: this one, or `pipeline`. A stage of its own, of one task."""

    name = "report"

    def __init__(self, pipeline: str = "") -> None:
        super().__init__()
        self.pipeline = pipeline
        if pipeline and not Path(pipeline).is_dir():
            raise ConfigError(f"report.pipeline={pipeline} is not the folder of a pipeline.")

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        if world_size != 1:
            raise ConfigError(f"report runs once, but its stage has {world_size} tasks: set its tasks to 1.")
        root = Path(self.pipeline) if self.pipeline else self.folder().parent
        with aside(root / REPORT) as file:
            file.write(page_of(root).encode("utf-8", "replace"))
        self.count("stages", len(_stages(root)))
        yield from ()


def page_of(root: Path) -> str:
    """The page of the pipeline in `root`. Raises DataError if no stage of it has begun."""
    stages = [_stage(folder) for folder in _stages(root)]
    if not stages:
        raise DataError(f"{root} holds no stage of a pipeline with numbers: run one first.")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    steps = [step for stage in stages for step in stage["steps"]]
    top = max([step["before"]["documents"] for step in steps] + [step["after"]["documents"] for step in steps] + [1])
    return environment.get_template("report.html.j2").render(
        title=root.name, stages=stages, sizes=_SIZES, top=top, version=m4train.__version__
    )


def _stages(root: Path) -> list[Path]:
    """The folders of the stages that have numbers, in the order of the pipeline."""
    found = {path.parent.name: path.parent for path in root.glob("*/statistics") if path.is_dir()}
    order: list[str] = []
    if (root / PIPELINE).is_file():
        order = [name for name in json.loads((root / PIPELINE).read_text(encoding="utf-8"))["stages"] if name in found]
    return [found[name] for name in [*order, *sorted(set(found) - set(order))]]


def _stage(folder: Path) -> dict[str, Any]:
    tasks = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["tasks"]
    done = tasks - len(missing_ranks(folder, tasks))
    steps = [_step(ledger, folder) for ledger in merged(folder)]
    return {"name": folder.name, "tasks": tasks, "done": done, "steps": steps}


def _step(ledger: Ledger, folder: Path) -> dict[str, Any]:
    counts = sorted(ledger.counts.items(), key=lambda item: (item[0] == KEPT, -item[1], item[0]))
    examples = {label: [_example(one, folder) for one in found] for label, found in ledger.examples.items()}
    charts = [
        {"name": name, "svg": histogram(found["edges"], found["counts"], found["thresholds"], name)}
        for name, found in ledger.histograms.items()
    ]
    return {
        "name": ledger.name,
        "before": {size: ledger.before.get(size, 0) for size in _SIZES},
        "after": {size: ledger.after.get(size, 0) for size in _SIZES},
        "counts": counts,
        "funnel": _funnel(ledger),
        "dropped": [(label, examples[label]) for label, _ in counts if label != KEPT and label in examples],
        "kept": examples.get(KEPT, []),
        "charts": charts,
    }


def _funnel(ledger: Ledger) -> list[dict[str, Any]]:
    """What went into and out of every rule of a step that says what it lost: one begins with what the other left."""
    rows = []
    now = {size: ledger.before.get(size, 0) for size in _SIZES}
    part = lambda label: _PARTS.index(label.partition("/")[0]) if label.partition("/")[0] in _PARTS else len(_PARTS)
    for label, lost in sorted(ledger.lost.items(), key=lambda item: (part(item[0]), -ledger.counts[item[0]], item[0])):
        after = {size: now[size] - lost.get(size, 0) for size in _SIZES}
        rows.append({"label": label, "count": ledger.counts[label], "before": now, "after": after})
        now = after
    return rows


def _example(example: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An example as its reader would see it: texts, small pictures, and what was measured."""
    media = {each["id"]: each for each in example["media"]}
    nodes, shown = [], 0
    for node in example["nodes"]:
        if node["type"] == "text":
            nodes.append({"text": node["text"]})
            continue
        place = media.get(node.get("sha256"))
        picture = _picture(place, folder) if place and shown < _IMAGES else None
        shown += picture is not None
        label = node.get("alt") or node.get("url") or node.get("sha256") or "image"
        nodes.append({"image": picture, "label": label})
    about = {name: value for name, value in example.items() if name not in ("id", "url", "nodes", "media")}
    return {"id": example["id"], "url": example["url"], "nodes": nodes, "about": about}


def _picture(place: dict[str, Any], folder: Path) -> str | None:
    """A small copy of an image as a link that holds it; None if it cannot be shown any more."""
    try:
        with open(folder / place["path"], "rb") as file:
            file.seek(place["offset"])
            content = file.read(place["length"])
        if hashlib.sha256(content).hexdigest() != place["id"]:
            return None
        return data_uri(decode_image(content), _SIDE, "JPEG")
    except (OSError, BadSample):
        return None
