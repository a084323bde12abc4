"""What the demo promises is compared with what it reached."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
    ("least", "code", "said"),
    [
        (("single=97.0", "multi=92"), 0, ""),
        (("single=97.5", "multi=92.5"), 0, ""),  # just reached
        (("single=97", "multi=93"), 1, "multi  92.5 % of 360 answers are right, at least 93 % promised: MISSED"),
        (("single=98", "multi=90"), 1, "single 97.5 % of 360 answers are right, at least 98 % promised: MISSED"),
    ],
)
def test_a_missed_promise_is_an_error(least, code, said, tmp_path):
    scores = {"single": {"exact_match": 0.975, "count": 360}, "multi": {"exact_match": 0.925, "count": 360}}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    command = [sys.executable, str(LAUNCH / "promise.py"), str(tmp_path / "evaluation.json"), *least]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert said in done.stdout
    assert done.stdout.count("MISSED") == code


def test_the_demo_ends_with_its_promise():
    script = (LAUNCH / "digits.sh").read_text()
    assert "set -euo pipefail" in script
    assert script.rstrip().splitlines()[-1].startswith("python launch/promise.py runs/digits/sft/evaluation.json ")
