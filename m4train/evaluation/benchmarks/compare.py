"""Two results of benchmarks against each other, sample by sample, as a page with the answers that changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4train.errors import ConfigError
from m4train.evaluation.metrics.said import half_width
from m4train.inspection.pages import render
from m4train.json_lines import read_lines

Line = dict[str, Any]
_SHOWN = 200  # changed samples of a benchmark on the page


@dataclass(frozen=True)
class Compared:
    """One benchmark: the mean of the differences of scores (second - first) over the samples that both have."""

    name: str
    count: int
    difference: float
    interval: tuple[float, float]  # 95 %, paired
    changed: list[tuple[Line, Line]]
    left_out: int  # samples that only one of them has
    same_prompt: bool


def compare(first: Path, second: Path) -> list[Compared]:
    """Every benchmark of which both folders hold lines. Raises ConfigError if there is none."""
    names = sorted({path.stem for path in first.glob("*.jsonl")} & {path.stem for path in second.glob("*.jsonl")})
    found = [
        _compared(name, *(read_lines(folder / f"{name}.jsonl", ("score",)) for folder in (first, second)))
        for name in names
    ]
    found = [each for each in found if each is not None]
    if not found:
        raise ConfigError(f"{first} and {second} hold no scored samples of the same benchmark: evaluate both first.")
    return [each for each in found if each is not None]


def _compared(name: str, ours: Sequence[Line], theirs: Sequence[Line]) -> Compared | None:
    first, second = ({line["number"]: line for line in lines} for lines in (ours, theirs))
    both = sorted(first.keys() & second.keys())
    both = [number for number in both if first[number]["key"] == second[number]["key"]]
    if not both:
        return None
    gains = [second[number]["score"] - first[number]["score"] for number in both]
    mean, half = math.fsum(gains) / len(gains), half_width(gains)
    changed = [(first[number], second[number]) for number, gain in zip(both, gains) if gain]
    left_out = len(first.keys() | second.keys()) - len(both)
    prompts = {line["prompt"] for line in (*ours, *theirs)}
    return Compared(name, len(both), mean, (mean - half, mean + half), changed, left_out, len(prompts) == 1)


def page(found: Sequence[Compared], first: str, second: str, pictures: dict[tuple[str, int], list[str]]) -> str:
    """HTML that opens offline; `pictures` of (benchmark, number) are links that hold them."""
    shown = []
    for each in found:
        changed = [
            {
                "key": one["key"],
                "question": one["question"],
                "right": " | ".join(one["references"]),
                "better": other["score"] > one["score"],
                "images": pictures.get((each.name, one["number"]), []),
                "said": [(who, line["score"], line["answer"]) for who, line in (("first", one), ("second", other))],
            }
            for one, other in each.changed[:_SHOWN]
        ]
        shown.append({"name": each.name, "sentence": sentence(each), "changed": changed})
    return render("changed.html.j2", title=f"{first} and {second}", found=shown)


def sentence(each: Compared) -> str:
    """The difference of a benchmark in one line."""
    low, high = (100 * bound for bound in each.interval)
    better = sum(other["score"] > one["score"] for one, other in each.changed)
    text = f"{100 * each.difference:+.2f} [{low:+.2f}, {high:+.2f}] over {each.count:,} samples; "
    text += f"{better} better, {len(each.changed) - better} worse"
    text += f"; {each.left_out} samples are in one of them only" if each.left_out else ""
    return text + ("" if each.same_prompt else "; the prompts differ")
