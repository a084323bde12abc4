"""The tensors of a model folder, read one at a time: safetensors, or pickle files if they are asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from m4train.errors import CheckpointError
from m4train.json_files import read_mapping

INDEX = "model.safetensors.index.json"
_PICKLE_INDEX = "pytorch_model.bin.index.json"


class TensorFolder:
    """The tensors of a model folder, memory-mapped and read one at a time.

    If there is no safetensors file, `allow_pickle` reads pytorch_model.bin (whole or in shards) with the unpickler of torch
    that makes nothing but tensors.

    Raises:
        CheckpointError: there is no file to read, or the index names a file that is missing.
    """

    def __init__(self, folder: str | Path, allow_pickle: bool = False) -> None:
        self.folder = Path(folder)
        self._open: dict[str, _Safetensors | _Pickled] = {}
        forms: list[tuple[str, str, type[_Safetensors | _Pickled]]] = [(INDEX, "model.safetensors", _Safetensors)]
        if allow_pickle:
            forms.append((_PICKLE_INDEX, "pytorch_model.bin", _Pickled))
        for index, file, kind in forms:
            self._kind = kind
            if (self.folder / index).is_file():
                self.files = self._indexed(self.folder / index)
                return
            if (self.folder / file).is_file():
                self.files = dict.fromkeys(self._file(file).names(), file)
                return
        raise CheckpointError(self._nothing())

    def _indexed(self, index: Path) -> dict[str, str]:
        files = read_mapping(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError(f"{index} holds no weight_map of names to files: copy the folder again")
        missing = sorted({file for file in files.values() if not (self.folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{index} names {', '.join(missing)}, which are missing: copy the folder again")
        return files

    def _nothing(self) -> str:
        pickles = sorted(p.name for p in self.folder.glob("*.bin"))
        if pickles:
            return (
                f"{self.folder} holds only pickle files ({', '.join(pickles)}), which can run any code when read: convert "
                "them to safetensors first, by from_pretrained(..., allow_pickle=True) and save_pretrained"
            )
        return f"{self.folder} holds neither model.safetensors nor {INDEX}: name a folder with a saved model"

    def _file(self, name: str) -> _Safetensors | _Pickled:
        if name not in self._open:
            try:
                self._open[name] = self._kind(self.folder / name)
            except Exception as error:  # the libraries raise their own types, by version
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise CheckpointError(f"{self.folder / name} cannot be read ({reason}): copy it again") from error
        return self._open[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(self.files[name]).shape(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._file(self.files[name]).tensor(name)


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _Pickled:
    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]
