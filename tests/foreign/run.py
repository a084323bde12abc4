"""Runs transformers' own test modules of these model families with m4train's classes in the place of transformers'.

    python -m tests.foreign.run FOLDER [-k EXPRESSION] [--only FAMILY ...] [--files FOLDER]

FOLDER is a copy of the transformers repository, or of its tests. Every module runs twice: with transformers' classes, which
tells what can pass here at all (no GPU, no network, another release), and with ours. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from tests.foreign import in_place, stand_ins
from tests.foreign.listed import LISTED

ROOT = Path(__file__).parents[2]
FAMILIES = ("idefics", "idefics2", "idefics3", "smolvlm")
NEEDED = ("parameterized", "requests")  # which their modules import
MODULES = ("modeling", "processing", "image_processing", "processor")


class Result(NamedTuple):
    """What came of one test. `kind`: passed, skipped, listed (with the reason), not here (fails with theirs too), or failed."""

    test: str
    kind: str
    said: str


def modules(folder: Path, families: Iterable[str] = FAMILIES) -> list[Path]:
    """The test modules of the families in a copy of the repository."""
    root = folder if (folder / "tests" / "models").is_dir() else folder.parent
    found = [root / "tests" / "models" / f / f"test_{m}_{f}.py" for f in families for m in MODULES]
    found = [path for path in found if path.is_file()]
    if not found:
        raise SystemExit(f"{folder} holds no tests/models/FAMILY/test_modeling_FAMILY.py of {', '.join(families)}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"the test modules of transformers import {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    return found


def outcomes(paths: list[Path], classes: str, files: Path, more: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """The outcome of each test and what it said, with the `classes` of "ours" or "theirs", run in the folder `files`."""
    root = paths[0].parents[3]
    with tempfile.NamedTemporaryFile() as written:
        environment = {
            **os.environ,
            in_place.CLASSES: classes,
            in_place.OUTCOMES: written.name,
            in_place.WANTED: " ".join(dict.fromkeys(path.parent.name for path in paths)),
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), str(ROOT), str(root / "src"), os.environ.get("PYTHONPATH", "")]
            ),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        options = ["-p", "in_place", "--noconftest", "--rootdir", str(root), "-c", os.devnull, "-q", "--tb=native"]
        options += ["-p", "no:cacheprovider", "--import-mode=prepend", "--continue-on-collection-errors", *more]
        command = [sys.executable, "-W", "ignore", "-m", "pytest", *options, *map(str, paths)]
        done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True)
        rows = [json.loads(line) for line in Path(written.name).read_text().splitlines()]
        if done.returncode not in (0, 1, 2) or not rows:
            raise SystemExit(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, tuple[str, str]] = {}
    for row in rows:  # one that passes and fails when it is taken down has failed
        if found.get(row["test"], ("passed",))[0] != "failed":
            found[row["test"]] = (row["outcome"], row["said"])
    return found


def reason_of(test: str) -> str | None:
    """Why a test is listed, if it is."""
    return next((why for why, patterns in LISTED.items() for one in patterns if fnmatchcase(test, f"*::{one}")), None)


def results(ours: dict[str, tuple[str, str]], theirs: dict[str, tuple[str, str]]) -> list[Result]:
    """What came of every test, in their order."""
    found = []
    for test, (outcome, said) in ours.items():
        kind, reason, passes = outcome, reason_of(test), theirs.get(test, ("failed", ""))[0] == "passed"
        if outcome == "failed" and not passes:
            kind = "not here"
        elif outcome != "passed" and passes:  # if it is skipped, then by what our classes lack
            kind, said = ("failed", said) if reason is None else ("listed", reason)
        found.append(Result(test, kind, said))
    return found


KINDS = ("passed", "listed", "failed", "skipped", "not here")


def table(found: list[Result]) -> str:
    """Counts a module."""
    counts: dict[str, Counter[str]] = {}
    for one in found:
        counts.setdefault(Path(one.test.split("::")[0]).name, Counter())[one.kind] += 1
    lines = [" | ".join(["module", *KINDS]), " | ".join(["---"] * (1 + len(KINDS)))]
    lines += [" | ".join([name, *(str(row[kind]) for kind in KINDS)]) for name, row in counts.items()]
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.foreign.run", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a copy of the transformers repository")
    parser.add_argument("-k", metavar="EXPRESSION", help="only the tests whose names it matches, as pytest has it")
    parser.add_argument("--only", nargs="+", default=FAMILIES, choices=FAMILIES, help="only these families")
    parser.add_argument("--files", type=Path, help="a folder of the hub's files, ORGANISATION/NAME/..., and pictures")
    parser.add_argument("--json", type=Path, help="write the outcome of every test there")
    given = parser.parse_args(arguments)
    paths = modules(given.folder.resolve(), given.only)
    more = ["-k", given.k] if given.k else []
    with tempfile.TemporaryDirectory() as made:
        files = given.files or stand_ins.make(Path(made), given.only)
        theirs = outcomes(paths, "theirs", files, more)
        found = results(outcomes(paths, "ours", files, more), theirs)
    if given.json:
        given.json.write_text(json.dumps([one._asdict() for one in found], indent=1))
    print(table(found))
    failed = [one for one in found if one.kind == "failed"]
    for one in failed:
        print(f"\nFAILED {one.test}\n  {one.said}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
