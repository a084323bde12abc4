"""What holds for all tests, and for the processes they start."""

import gc
import os
import shutil
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, settings

from m4train import terminal
from tests.helpers import warm

terminal.SOON = float("inf")  # a slow machine says no more on stderr than a fast one

# One thread a process, as the processes that tests start have: results are compared to the last bit, and threads that wait
# for a busy core only spin. This comes before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_SILENT", "true")

# The same examples on every machine, and others in each `make test-full`. How long one takes, or drawing it, says nothing on a
# machine that does other work.
slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, database=None, **slow)
settings.register_profile("others", print_blob=True, **slow)
settings.load_profile("others" if os.environ.get("M4TRAIN_FULL_MATRIX") else "same")

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
def nothing_expected(request, monkeypatch):
    """Runs say what memory and time they expect, which takes longer than the steps of a test: in tests marked `expects` alone."""
    if "expects" in request.keywords:
        monkeypatch.setenv(warm.EXPECTING, "1")
    elif "m4train.commands.train" in sys.modules:
        from m4train.training.callbacks.base import Callback

        monkeypatch.setattr("m4train.commands.train.Expectation", Callback)


@pytest.fixture(autouse=True)
def transformers_not_asked(request, monkeypatch):
    """Exports ask transformers in a process of its own, which takes seconds: in tests marked `asks_transformers` alone."""
    if "asks_transformers" not in request.keywords:
        monkeypatch.setattr("m4train.commands.export_check.installed", lambda: False)
