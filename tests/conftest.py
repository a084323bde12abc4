"""What holds for all tests, and for the processes they start."""

import gc
import os
import shutil
import tempfile

import pytest

from m4train import terminal

terminal.SOON = float("inf")  # a slow machine says no more on stderr than a fast one

# One thread a process, as the processes that tests start have: results are compared to the last bit, and threads that wait
# for a busy core only spin. This comes before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_SILENT", "true")

# Temporary files lie in memory where there is room and programs may lie there too: tests save thousands of checkpoints, each
# of which waits for a disk several times, and none of them cuts the power.
MEMORY = "/dev/shm"
if (
    "TMPDIR" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    and shutil.disk_usage(MEMORY).free > 4 * 2**30
):
    os.environ["TMPDIR"] = tempfile.tempdir = MEMORY


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory):
    """The digits dataset, built once for all tests that only read it."""
    from data_pipelines import digits

    root = tmp_path_factory.mktemp("digits") / "set"
    digits.prepare(root)
    return root


def pytest_collection_finish():
    """What was imported stays: collections of garbage need not walk it, which takes half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def transformers_not_asked(request, monkeypatch):
    """Exports ask transformers in a process of its own, which takes seconds: in tests marked `asks_transformers` alone."""
    if "asks_transformers" not in request.keywords:
        monkeypatch.setattr("m4train.commands.export_check.installed", lambda: False)
