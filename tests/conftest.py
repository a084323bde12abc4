"""What holds for all tests, and for the processes they start."""

import gc
import os
import sys
from pathlib import Path

import pytest

# One thread a process, as the processes that tests start have: results are compared to the last bit, and threads that wait
# for a busy core only spin. This comes before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed compiles a small extension for the CPU on first use; each environment keeps its own, or two would take turns.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_SILENT", "true")


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
