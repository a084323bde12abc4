"""A run that is killed wherever a file gets its name, or within a stage, ends with the same bytes when it is started again."""

import os
import shutil
from pathlib import Path

import pytest

from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.runner import run_pipeline
from tests.helpers.pipelines import digests
from tests.unit.data_pipelines.frame.test_runner import YAML

FULL = bool(os.environ.get("M4TRAIN_FULL_MATRIX"))
FIXTURE = Path(__file__).parents[3] / "fixtures" / "documentation.warc.gz"


def _run(folder, pipeline, *overrides):
    return run_pipeline(load_pipeline(pipeline, [f"folder={folder}", *overrides]))


def _killed(at, after, run):
    """Runs in a child that is gone, as after SIGKILL, before or after its `at`-th rename; how many renames there were."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count, real = 0, os.replace

        def replace(*arguments):
            nonlocal count
            if count == at and not after:
                os._exit(9)
            real(*arguments)
            if count == at:
                os._exit(9)
            count += 1

        os.replace = replace
        try:
            run()
        finally:
            os.write(writer, str(count).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        renames = said.read()
    os.waitpid(child, 0)
    return int(renames or 0)


def _check_kills(tmp_path, run, steps, pattern):
    """`run(folder)` gives the same files if it is killed at each of some renames and started again."""
    renames = _killed(None, False, lambda: run(tmp_path / "whole"))
    whole = digests(tmp_path / "whole", pattern)
    assert renames > 10
    assert len(whole) >= 2
    for at in steps(renames):
        for after in (False, True) if FULL else (at % 2 == 1,):  # after one is before the next
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
            assert _killed(at, after, lambda: run(tmp_path / "again")) == 0
            assert run(tmp_path / "again") == 0
            assert digests(tmp_path / "again", pattern) == whole, (at, after)
            assert not list((tmp_path / "again").rglob("*.unfinished"))


@pytest.mark.slow
def test_at_every_border(tmp_path):
    (tmp_path / "numbers.yaml").write_text(YAML)
    pipeline = str(tmp_path / "numbers.yaml")
    _check_kills(tmp_path, lambda folder: _run(folder, pipeline, "tasks=1"), range, "*/*-*.*")


@pytest.mark.slow
def test_at_borders_of_the_pipeline_from_pages_to_shards(tmp_path):
    overrides = (f"paths=[{FIXTURE}]", "filters=none", "validation=0.2", "buckets=2")

    def some(renames):
        return range(1, renames, renames // 5)

    _check_kills(tmp_path, lambda folder: _run(folder, "web", *overrides), some, "write/shards/*.tar")


def test_within_a_stage(tmp_path):
    (tmp_path / "numbers.yaml").write_text(YAML)
    pipeline = str(tmp_path / "numbers.yaml")
    assert _run(tmp_path / "whole", pipeline) == 0
    for page in (0, 7, 19):
        once = tmp_path / f"died-{page}"
        more = (f"odd.die_at={page}", f"odd.once={once}")
        folder = tmp_path / f"out-{page}"
        child = os.fork()
        if not child:
            _run(folder, pipeline, *more)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        assert _run(folder, pipeline, *more) == 0
        assert digests(folder) == digests(tmp_path / "whole")
