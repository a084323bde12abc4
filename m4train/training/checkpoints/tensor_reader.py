"""A reader of the format of torch.distributed.checkpoint under which no file can run code; imported only to read.

That format keeps its table of contents as a pickle, and values other than tensors as pickles as well. The table is read by
an unpickler that knows the classes of such a table alone, and a table that lists anything but tensors is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from m4train.errors import CheckpointError

_TABLE = ".metadata"
_CLASSES = {
    *((metadata.__name__, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((metadata.__name__, name) for name in ("ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata")),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((type(Path()).__module__, name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if known or (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of such a table")


class TensorReader(dcp.FileSystemReader):
    """Reads the tensors in a folder. Raises CheckpointError, naming the file, for a table of contents that is not one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = Path(folder)
        self.table = self._table()  # here, since torch hides what is raised where it asks for it

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        return self.table

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"The tensors in {self.folder} cannot be read ({why}).") from error

    def _table(self) -> Metadata:
        try:
            with (self.folder / _TABLE).open("rb") as file:
                table = _Unpickler(file).load()
            wrong = self._wrong(table)
        except OSError:
            raise
        except Exception as error:  # a pickle that is not one fails in every way
            wrong = str(error) or type(error).__name__
        if wrong:
            raise CheckpointError(f"{self.folder / _TABLE} is not a table of tensors: {wrong}; it was not read.")
        table.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return table

    def _wrong(self, table: Any) -> str | None:
        """What is wrong with a table, in words."""
        if not isinstance(table, Metadata):
            return f"it holds {type(table).__name__}"
        most = sum(path.stat().st_size for path in self.folder.iterdir())
        for name, entry in table.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                return f"{name} is not a tensor"
            if torch.Size(entry.size).numel() * entry.properties.dtype.itemsize > most:
                return f"{name} is larger than the files"
        for index, place in table.storage_data.items():
            if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
                return f"{index.fqn} is said to be in {place.relative_path!r}"
        return None
