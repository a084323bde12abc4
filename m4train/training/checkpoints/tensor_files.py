"""The tensors of a checkpoint on disk, in the format of torch.distributed.checkpoint.

What knows that format is imported where it is used: that takes most of a second, and most commands read no checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from m4train.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor in a folder, by name. Raises OSError if there are none."""
    from m4train.training.checkpoints.tensor_reader import TensorReader

    return TensorReader(folder).table.state_dict_metadata


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors from a checkpoint's folder of tensors, by name; each rank reads its own share, alone.

    Raises CheckpointError for a file that is not one of tensors, CheckpointException for tensors that do not fit.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from m4train.training.checkpoints.tensor_reader import TensorReader

    reader = TensorReader(folder)
    try:
        with one_process_is_fine():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, (CheckpointError, KeyboardInterrupt)):  # torch catches everything
            raise cause from error
        raise


@contextmanager
def one_process_is_fine() -> Iterator[None]:
    """Keeps torch from warning that a checkpoint is read or written by one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
