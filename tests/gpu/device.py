"""Where the tests of this folder run: on a CUDA device; or, with M4TRAIN_GPU_TESTS_ON_CPU=1, as far as that goes on the CPU, which
finds what is wrong with the tests themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.helpers.synchronisation import Synchronisations

ON_CPU = os.environ.get("M4TRAIN_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(ON_CPU, reason="asks CUDA itself")


@contextmanager
def never_waiting(active: bool = True) -> Iterator[None]:
    """An error wherever torch would wait for the device; on the CPU, wherever it would on one."""
    if not active:
        yield
    elif ON_CPU:
        with Synchronisations() as seen:
            yield
        assert not seen.found, "\n".join(seen.found)
    else:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
