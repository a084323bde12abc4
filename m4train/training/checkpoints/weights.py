"""The weights of a checkpoint without the run around them: read one by one, adapters added to what they adapt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from m4train.config import AdapterConfig
from m4train.errors import CheckpointError
from m4train.models.token_rows import NEW_ROWS
from m4train.training.adapters import apply_adapters, merge_adapters, settings_of_module
from m4train.training.checkpoints.save import TENSORS
from m4train.training.checkpoints.tensor_files import read_tensors, stored_tensors
from m4train.training.naming import canonical_parameters, is_adapter
from m4train.training.quantization import quantize_parts
from m4train.training.tensors import BUFFER, PARAMETER, weight_tensors

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What a checkpoint says of its tensors, by name. Raises CheckpointError if it holds none."""
    try:
        return stored_tensors(folder / TENSORS)
    except OSError as error:
        raise CheckpointError(f"{folder} holds no portable checkpoint: {error.strerror}.") from error


def rows_apart(folder: Path) -> int:
    """How many rows of new tokens a checkpoint holds apart from the others."""
    found = (entry for name, entry in _metadata(folder).items() if name.endswith(NEW_ROWS))
    return next((entry.size[0] for entry in found), 0)


class CheckpointWeights:
    """The parameters of a portable checkpoint by canonical name, read when they are asked for.

    `names` are those of the model without adapters, which are left out if not `adapted`. Raises CheckpointError if the
    folder holds no tensors.
    """

    def __init__(self, folder: Path, adapter: AdapterConfig, adapted: bool = True) -> None:
        self.folder, self.adapter = folder / TENSORS, adapter
        self._stored = _metadata(folder)
        own = [name.removeprefix(PARAMETER) for name in self._stored if name.startswith(PARAMETER)]
        self.names = [name for name in own if not is_adapter(name)]
        self.adapter_names = [name for name in own if adapted and is_adapter(name)]

    def stored(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Parameters exactly as they were stored, adapters' too."""
        return dict(zip(names, self._read([PARAMETER + name for name in names]), strict=True))

    def merged(self, name: str, shape: Sequence[int], base: Callable[[str], Tensor] | None = None) -> Tensor:
        """A parameter of the model without adapters, of shape `shape`: what its adapter learned is added to it.

        If it was stored in 4 bits, it is the value that these stand for. `base` gives another value to add the adapter to.
        """
        module = name.removesuffix(".weight")
        quantized = f"{BUFFER}{name}.absmax" in self._stored
        adapter = [key for key in self.adapter_names if key.startswith(f"{module}.lora_")]
        if not (adapter or quantized):
            return self.stored([name])[name]
        if base is not None:
            holder = _Holder(_plain(base(name).float(), self._is_embedding(module)))
        else:
            holder = self._holder(name, shape, quantized)
        if adapter:
            self._adapt(holder, module)
        merge_adapters(holder)
        return holder.layer.weight.detach()

    def _adapt(self, holder: nn.Module, module: str) -> None:
        """Puts the stored adapter of `module` around the layer of a holder."""
        kind = "lora" if self.adapter.kind == "qlora" else self.adapter.kind
        own = settings_of_module(self.adapter, module)
        apply_adapters(holder, replace(own, kind=kind, targets={"layer": ["layer"]}))
        for name, parameter in canonical_parameters(holder).items():
            if is_adapter(name):
                stored = f"{module}.{name.removeprefix('layer.')}"
                parameter.data = self.stored([stored])[stored]

    def _holder(self, name: str, shape: Sequence[int], quantized: bool) -> nn.Module:
        """A module whose one layer, `layer`, has the stored weight `name`."""
        holder = _Holder(_plain(torch.zeros(*shape), self._is_embedding(name.removesuffix(".weight"))))
        if not quantized:
            holder.layer.weight.data = self.stored([name])[name].float()
            return holder
        quantize_parts(holder, ["layer"])
        module = name.removesuffix(".weight")
        live = {key: tensor for key, tensor in weight_tensors(holder).items() if "layer.weight" in key}
        stored = self._read([key.replace("/layer.", f"/{module}.", 1) for key in live])
        for tensor, value in zip(live.values(), stored, strict=True):
            tensor.copy_(value)
        return holder

    def _is_embedding(self, module: str) -> bool:
        return any(key.startswith(f"{module}.lora_embedding") for key in self.adapter_names)

    def _read(self, keys: Sequence[str]) -> list[Tensor]:
        missing = [key for key in keys if key not in self._stored]
        if missing:
            raise CheckpointError(f"Checkpoint {self.folder.parent} lacks {', '.join(missing)}.")
        sizes = [(self._stored[key].size, self._stored[key].properties.dtype) for key in keys]
        tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in zip(keys, sizes, strict=True)}
        read_tensors(self.folder, tensors)
        return list(tensors.values())


class _Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {"layer": ("layer.",)}


def _plain(weight: Tensor, embedding: bool) -> nn.Module:
    layer = nn.Embedding(1, 1, device="meta") if embedding else nn.Linear(1, 1, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        layer.num_embeddings, layer.embedding_dim = weight.shape
    return layer
