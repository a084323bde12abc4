"""Reading and writing model folders: config.json, generation_config.json and safetensors, whole or in shards."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from m4train.errors import CheckpointError, ConfigError, M4Error
from m4train.hub import HUB_OPTIONS, weight_folder
from m4train.json_files import read_mapping
from m4train.models.attention import check_attention
from m4train.models.configuration import PretrainedConfig
from m4train.models.generation_settings import StatedSettings, as_mapping, stated_ends
from m4train.models.load_options import changed_config, given_config, one_device, refuse_options, shard_bytes
from m4train.models.public_methods import PublicMethods
from m4train.models.quantized import BitsAndBytesConfig, is_quantized, quantize_linears
from m4train.models.tensor_folder import TensorFolder
from m4train.models.weight_files import write_files
from m4train.stops import with_turn_end

# Buffers that old releases stored and that are computed here.
_OBSOLETE = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


class PretrainedModel(PublicMethods):
    """Adds `from_pretrained` and `save_pretrained`."""

    config_class: ClassVar[type[PretrainedConfig]]
    checkpoint_prefix: ClassVar[str] = ""  # what the names in a folder of the model with head start with, here

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.generation_config = {}

    @property
    def generation_config(self) -> StatedSettings:
        """How `generate` answers unless a call says otherwise; may be set to a mapping, or an object of another library."""
        return self.__dict__["_generation_config"]

    @generation_config.setter
    def generation_config(self, given: Any) -> None:
        self.__dict__["_generation_config"] = StatedSettings(as_mapping(given))

    def tied_names(self) -> dict[str, str]:
        return {}

    def hub_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors`, by name, as a published folder holds them."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.tied_names()}

    def tie_weights(self) -> None:
        """Makes the parameters of `tied_names` one again, after they were replaced."""
        for name, source in self.tied_names().items():
            module, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(module), attribute, self.get_parameter(source))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        config: Any = None,
        device: torch.device | str = "cpu",
        device_map: Any = None,
        strict: bool = True,
        allow_pickle: bool = False,
        use_safetensors: bool | None = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        load_in_4bit: bool = False,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """A model with the weights of a folder or hub model, in evaluation mode; with `output_loading_info` also a mapping of
        the names of missing and unexpected tensors.

        A head that is stored with other values than the embeddings it is tied to is kept, untied, with a warning.

        Args:
            dtype: of the parameters, also as torch_dtype; None or "auto": as stored.
            config: instead of the folder's config.json.
            device: of the parameters; device_map="auto" means cuda if there is one, a mapping must name one device.
            use_safetensors: False: as allow_pickle.
            strict: refuse missing and extra tensors; False: missing ones get random weights.
            allow_pickle: read pytorch_model.bin if there is no safetensors file, tensors alone.
            attn_implementation: checked alone, as device and dtype decide: a flash kernel for half precision on CUDA
                ("flash_attention_2"), `scaled_dot_product_attention` for the rest ("sdpa").
            quantization_config: a `BitsAndBytesConfig`, to store linear layers in 4 bits; also load_in_4bit=True.
            options: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` of a hub model, and fields of
                the configuration that take the place of the folder's. What cannot act is refused.

        Raises:
            ConfigError: there is no such folder or hub model, it holds another kind of model, or an option that would not act.
            CheckpointError: files, tensors or shapes that do not fit.
            TypeError: an option that there is not.
        """
        if load_in_4bit and quantization_config is None:
            quantization_config = {"load_in_4bit": True}
        four_bits = None if quantization_config is None else BitsAndBytesConfig.of(quantization_config)
        allow_pickle = allow_pickle or use_safetensors is False
        changes = refuse_options(f"{cls.__name__}.from_pretrained", options)
        hub = {name: changes.pop(name) for name in HUB_OPTIONS if name in changes}
        folder = weight_folder(pretrained_model_name_or_path, allow_pickle, **hub)
        device = one_device(device, device_map)
        model = cls._without_weights(folder, config, changes, allow_pickle)
        info = model._fill(folder, dtype or torch_dtype, device, strict, allow_pickle)
        check_attention(attn_implementation, model.dtype)
        if four_bits is not None:
            quantize_linears(model, four_bits)
        model._read_generation_config(folder)
        return (model.eval(), info) if output_loading_info else model.eval()

    def _fill(self, folder: Path, dtype: Any, device: Any, strict: bool, allow_pickle: bool) -> dict[str, Any]:
        """Reads the weights of a folder, makes up those that it lacks, and says which, as transformers does."""
        missing, extra = self.load_folder(folder, dtype=dtype, device=device, strict=strict, allow_pickle=allow_pickle)
        if missing:
            self._fill_missing(missing, dtype, device)
        return {
            "missing_keys": set(missing),
            "unexpected_keys": set(extra),
            "mismatched_keys": set(),
            "error_msgs": [],
        }

    def _read_generation_config(self, folder: Path) -> None:
        """What the folder says of generation, with all that ends an answer."""
        path = folder / "generation_config.json"
        if path.is_file():
            self.generation_config = read_mapping(path)
        if hasattr(self, "generate"):
            ends = stated_ends(self.config, self.generation_config)
            self.generation_config = with_turn_end(folder, ends, self.generation_config)

    @classmethod
    def _without_weights(cls, folder: Path, config: Any, changes: dict[str, Any], allow_pickle: bool) -> Self:
        """The model of `config`, or of the folder's, with `changes`, on the meta device; untied if the folder holds it so."""
        if config is None:
            config = cls.config_class.from_pretrained(folder)
            if head_left_out(cls.__name__, folder, allow_pickle):
                config.tie_word_embeddings = True
        config = changed_config(cls.config_class, given_config(cls.config_class, config), changes)
        model = cls._described(config, folder)
        if model.tied_names() and _holds_another_head(model, TensorFolder(folder, allow_pickle)):
            config.tie_word_embeddings = False
            model = cls._described(config, folder)
        return model

    @classmethod
    def _described(cls, config: Any, folder: Path) -> Self:
        """The model of a configuration, on the meta device. Raises ConfigError for values that make none."""
        try:
            with torch.device("meta"):
                return cls(config)
        except M4Error:
            raise
        except Exception as error:  # whatever torch says of sizes that do not fit
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{folder / 'config.json'} describes no model ({reason}): correct it, or copy the file again."
            ) from error

    def load_folder(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        strict: bool = True,
        allow_pickle: bool = False,
    ) -> tuple[list[str], list[str]]:
        """Replaces the parameters by the tensors of `folder`, without a second copy in memory.

        Returns:
            names of parameters the folder does not hold, and of what it holds beyond them (only with `strict` False).
        """
        wanted = _dtype_of(dtype)
        stored = TensorFolder(folder, allow_pickle)
        expected = {name: p for name, p in self.named_parameters() if name not in self.tied_names()}
        names = self._stored_names(stored)
        missing = sorted(set(expected) - set(names))
        extra = sorted(set(names) - set(expected) - set(self.tied_names()))
        if strict and (missing or extra):
            raise CheckpointError(_mismatch(folder, missing, extra))
        for name in expected.keys() - set(missing):
            shape = stored.shape(names[name])
            if shape != tuple(expected[name].shape):
                raise CheckpointError(
                    f"{names[name]} in {folder} has shape {shape}, but the model needs {tuple(expected[name].shape)}: the "
                    "configuration belongs to another checkpoint"
                )
            tensor = stored[names[name]]
            self._replace(name, tensor.to(device=device, dtype=wanted))
        self.tie_weights()
        return missing, extra

    def _stored_names(self, stored: TensorFolder) -> dict[str, str]:
        """Parameter name here -> name in the folder."""
        names = [name for name in stored.files if not _OBSOLETE.search(name)]
        prefix = self.checkpoint_prefix
        if prefix and any(name.startswith(prefix) for name in names):
            return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        return {name: name for name in names}

    def _replace(self, name: str, tensor: Tensor) -> None:
        module, _, attribute = name.rpartition(".")
        owner = self.get_submodule(module)
        trainable = getattr(owner, attribute).requires_grad
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=trainable))

    def _fill_missing(self, missing: list[str], dtype: torch.dtype | str | None, device: torch.device | str) -> None:
        """Random weights for the parameters `missing`; in the dtype of the others if None is given."""
        wanted = _dtype_of(dtype) or next((p.dtype for p in self.parameters() if not p.is_meta), None)
        with torch.device("meta"):
            fresh = type(self)(self.config)
        # Initialisation passes over what is on the meta device: nothing is drawn or held but what is missing.
        for name in missing:
            fresh._replace(name, torch.empty(fresh.get_parameter(name).shape, dtype=wanted, device=device))
        fresh.init_weights()
        for name in missing:
            self._replace(name, fresh.get_parameter(name).detach())
        self.tie_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch; leaves parameters on the meta device alone."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_bytes: int = 5_000_000_000,
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
        **options: Any,
    ) -> None:
        """Writes config.json, generation_config.json (if there is one) and the weights; those of an earlier save go.

        `max_shard_size` is a number of bytes, or a size such as "5GB". Raises CheckpointError for a model whose layers are
        stored in 4 bits, ConfigError for an option that would not act, TypeError for one that there is not.
        """
        left = refuse_options(f"{type(self).__name__}.save_pretrained", options)
        if unknown := sorted(name for name in left if name != "token"):  # of an upload, which is refused
            raise TypeError(f"save_pretrained has no argument {', '.join(unknown)}")
        if not safe_serialization:
            raise ConfigError(
                "save_pretrained writes safetensors alone, which every library reads: leave safe_serialization"
            )
        if max_shard_size is not None:
            max_shard_bytes = shard_bytes(max_shard_size)
        if any(is_quantized(module) for module in self.modules()):
            raise CheckpointError(
                "this model stores layers in 4 bits, which folders do not hold: save the one it was loaded from"
            )
        tensors = self.hub_tensors({name: p.detach() for name, p in self.named_parameters()})
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.extra["architectures"] = [type(self).__name__]
        save_folder(save_directory, self.config, tensors, self.generation_config, max_shard_bytes=max_shard_bytes)


def save_folder(
    folder: str | Path,
    config: PretrainedConfig,
    tensors: dict[str, Tensor],
    generation_config: dict[str, Any] | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model folder from tensors by name, replacing the model it may hold.

    It is what a checkpoint exporter calls with gathered parameters.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    stated = folder / "generation_config.json"
    if generation_config:
        stated.write_text(json.dumps(generation_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        stated.unlink(missing_ok=True)  # one of an earlier save would go on to decide how this model generates
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    write_files(folder, sizes, max_shard_bytes, tensors.__getitem__)


def head_left_out(kind: str, folder: Path, allow_pickle: bool = False) -> bool:
    """Whether a folder of `kind`, a model with head, holds none and does not say why: transformers 4.46 leaves the word
    tie_word_embeddings out of config.json if it is true, and then itself fills the head with random values."""
    stated = read_mapping(folder / "config.json")
    if "tie_word_embeddings" in stated or (stated.get("architectures") or [None])[0] != kind:
        return False
    return not any(name.startswith("lm_head.") for name in TensorFolder(folder, allow_pickle).files)


def _holds_another_head(model: Any, stored: TensorFolder) -> bool:
    """Whether the folder of a model with tied embeddings holds a head of other values; warns that it does."""
    names = model._stored_names(stored)
    for name, source in model.tied_names().items():
        if name in names and source in names and not torch.equal(stored[names[name]], stored[names[source]]):
            warnings.warn(
                f"{names[name]} differs from {names[source]}, which config.json says it is tied to: both are kept as they are "
                "stored, with tie_word_embeddings false",
                stacklevel=3,
            )
            return True
    return False


def _dtype_of(given: torch.dtype | str | None) -> torch.dtype | None:
    """None: as stored."""
    if isinstance(given, str):
        return None if given == "auto" else getattr(torch, given)
    return given


def _mismatch(folder: str | Path, missing: list[str], extra: list[str]) -> str:
    found = [f"lacks {', '.join(missing)}"] if missing else []
    found += [f"also holds {', '.join(extra)}"] if extra else []
    return f"{folder} {' and '.join(found)}: use the class of that checkpoint, or load with strict=False"
