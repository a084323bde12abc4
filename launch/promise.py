"""Compares the scores of an evaluation with the least that is promised of them, in per cent.

    python launch/promise.py EVALUATION.json SOURCE=LEAST ...

Exits with 1 if one is missed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(evaluation: str, *promised: str) -> int:
    found = json.loads(Path(evaluation).read_text())
    missed = False
    for promise in promised:
        source, _, least = promise.partition("=")
        score, count = found[source]["exact_match"], found[source]["count"]
        kept = score >= float(least) / 100
        missed = missed or not kept
        said = "" if kept else ": MISSED"
        print(f"{source:6} {100 * score:.1f} % of {count} answers are right, at least {least} % promised{said}")
    return 1 if missed else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
