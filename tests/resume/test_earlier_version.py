"""A run that an earlier version of this program began goes on as if nothing had changed.

The fixture holds two shards with their indexes, a tokenizer, a run stopped at step 3 of 6, and the metrics of the same run
left alone, all written by the version before the modules were put in order.
"""

import json
import tarfile
from pathlib import Path

import pytest

from tests.helpers import warm

FIXTURE = Path(__file__).parent / "fixtures" / "run_of_version_0_1.tar.xz"
ROUNDING = 1e-5  # relative: another processor sums in another order


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """The folder of the fixture after the stopped run went on, and when its indexes were written before and after that."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(FIXTURE) as tar:
        tar.extractall(folder, filter="data")
    indexes = sorted((folder / "data").glob("*.tar.*"))
    before = [index.stat().st_mtime_ns for index in indexes]
    child = warm.start_command("train", "run_dir=run", *_overrides(folder), folder=folder)
    assert child.wait(120) == 0, child.said()
    return folder, before, [index.stat().st_mtime_ns for index in indexes], child.said()


def _overrides(folder):
    """What the run was started with, except for the early stop, and the size of patches that its group of model had then."""
    lines = (folder / "run" / "overrides.txt").read_text().splitlines()
    return [*filter(None, lines), "model.architecture.vision_config.patch_size=8"]


def _metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_of_an_earlier_version_goes_on(continued):
    folder, *_, said = continued
    assert "step 4/6" in said
    assert "step 3/6" not in said
    ours, theirs = _metrics(folder / "run" / "metrics.jsonl"), _metrics(folder / "whole" / "metrics.jsonl")
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("data_hash", "plan_hash", "tokens", "loss_tokens", "images", "padding_fraction", "lr"):
            assert mine[key] == other[key], (key, mine["step"])
        for key in ("loss", "grad_norm", "loss/web", "loss/chat", "grad_norm/text"):
            assert mine[key] == pytest.approx(other[key], rel=ROUNDING), (key, mine["step"])


def test_indexes_of_an_earlier_version_are_made_again_and_the_run_goes_on(continued):
    _, before, after, _ = continued
    assert len(before) == 4
    assert not set(before) & set(after)


def test_a_checkpoint_holds_the_files_it_held(continued):
    folder, *_ = continued
    saved = folder / "run" / "checkpoints" / "step-000006"
    with tarfile.open(FIXTURE) as tar:
        held = {
            name.removeprefix("./run/checkpoints/step-000003/") for name in tar.getnames() if "/step-000003/" in name
        }
    assert {str(path.relative_to(saved)) for path in saved.rglob("*")} == held
