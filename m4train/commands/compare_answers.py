"""`m4train evaluate compare A B`: which answers changed between two results of benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m4train.errors import ConfigError

PAGE = "compared.html"


def compare(arguments: Sequence[str]) -> int:
    """Prints the paired difference of every benchmark; writes B/compared.html, with images if data=FOLDER is given. Returns 0."""
    given = dict(each.partition("=")[::2] for each in arguments if "=" in each)
    folders = [Path(each) for each in arguments if "=" not in each]
    if len(folders) != 2 or set(given) - {"data", "out"}:
        raise ConfigError(
            "evaluate compare takes two folders of results, and data=FOLDER, out=FILE: compare A B data=DATA."
        )
    from m4train.evaluation.benchmarks.compare import compare as compared
    from m4train.evaluation.benchmarks.compare import page, sentence

    found = compared(*folders)
    for each in found:
        print(f"{each.name:<16}{sentence(each)}")
    out = Path(given.get("out") or folders[1] / PAGE)
    pictures = _pictures(found, Path(given["data"])) if "data" in given else {}
    out.write_text(page(found, str(folders[0]), str(folders[1]), pictures), encoding="utf-8")
    print(f"the answers that changed: {out}")
    return 0


def _pictures(found: Any, data: Path) -> dict[tuple[str, int], list[str]]:
    """The images of the samples that changed, as links that hold them."""
    from m4train.evaluation.answers import data_uri
    from m4train.evaluation.benchmarks.questions import question
    from m4train.evaluation.benchmarks.records import place_of, records
    from m4train.evaluation.benchmarks.spec import load_benchmark

    pictures = {}
    for each in found:
        wanted, spec = {one["number"] for one, _ in each.changed}, load_benchmark(each.name)
        for number, (record, folder) in enumerate(records(place_of(data, each.name)) if wanted else ()):
            if number in wanted:
                images = question(record, folder, spec, "default", number).images
                pictures[each.name, number] = [data_uri(image) for image in images]
    return pictures
