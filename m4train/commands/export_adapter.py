"""A run's adapter as a folder that peft reads, and that folder read back by peft itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m4train.config import Config
from m4train.errors import CheckpointError, ConfigError
from m4train.families import FAMILIES
from m4train.models.pretrained import head_left_out
from m4train.models.token_rows import OWN_ROWS, joined_rows
from m4train.parts import NEW_TOKENS
from m4train.restore import plain_model
from m4train.run_files import CHECKPOINTS, STATE
from m4train.training.adapters import apply_adapters
from m4train.training.checkpoints.adapter_files import save_adapter, trained_whole
from m4train.training.checkpoints.state import Checkpoint
from m4train.training.checkpoints.weights import CheckpointWeights
from m4train.training.freezing import apply_freezing
from m4train.training.quantization import quantize_parts

BASE = "base"  # the folder next to an adapter's files that holds its base, if no other does


def is_model_folder(name: str, kind: str) -> bool:
    """Whether transformers can load `name` as `kind`: a whole model folder or a hub id, and neither a run nor a checkpoint."""
    folder = Path(name)
    if not folder.is_dir():
        return True
    return not ((folder / CHECKPOINTS).is_dir() or (folder / STATE).is_file() or head_left_out(kind, folder))


def write_adapter(config: Config, checkpoint: Checkpoint, folder: Path, base: str) -> None:
    """A peft folder: the adapter, the modules that trained in full, and the name `base` of the model they belong to.

    Rows of new tokens that trained apart are part of the whole tables of their modules. Raises ConfigError for a run without
    an adapter, CheckpointError for what peft cannot hold.
    """
    if config.adapter.kind == "none":
        raise ConfigError("export.adapters is apart, but this run trained no adapter: use export.adapters=merge.")
    weights = CheckpointWeights(checkpoint.folder, config.adapter)
    model = plain_model(config, checkpoint.folder)  # on the meta device, where nothing can be stored in 4 bits
    whole, tied = _trained_whole(config, model)
    inside = tuple(f"{module}." for module in whole)
    stored = weights.stored([*weights.adapter_names, *(name for name in weights.names if name.startswith(inside))])
    # peft copies each module it keeps in full, which unties it: the tied ones are written under every name.
    stored |= {name: stored[first].clone() for name, first in tied.items() if name.startswith(inside)}
    stored = joined_rows(model.config, stored)
    targets = sorted({name.split(".lora_")[0] for name in weights.adapter_names})
    save_adapter(folder, config.adapter, targets, stored, whole, base)


def has_rows_of(base: str, config: Config, checkpoint: Checkpoint) -> bool:
    """Whether the model `base` has a row for every token of a checkpoint's model: it has not if the run added tokens."""
    kind = FAMILIES[config.model.family].model_class.config_class
    return bool(kind.from_pretrained(base).token_rows == kind.from_pretrained(checkpoint.folder).token_rows)


def _trained_whole(config: Config, model: Any) -> tuple[list[str], dict[str, str]]:
    """The modules that trained in full next to the adapter, and the names of tied parameters with those they are tied to."""
    split = not getattr(model.config, "additional_vocab_size", 0)  # rows apart here alone: others know the whole module
    tied = model.tied_names()
    kind = "lora" if config.adapter.kind == "qlora" else config.adapter.kind
    apply_adapters(model, replace(config.adapter, kind=kind))
    new_tokens = bool(config.model.add_tokens) or (split and NEW_TOKENS in model.parts())
    apply_freezing(model, config.freeze, config.adapter.modules_to_save, new_tokens)
    found = [OWN_ROWS.sub("", name) if split else name for name in trained_whole(model)]
    return list(dict.fromkeys(found)), tied


def peft_model(config: Config, folder: Path) -> Any:
    """What peft's own loader makes of an adapter folder and its base, whose layers are stored in 4 bits if they trained so.

    Raises CheckpointError if peft cannot read the folder.
    """
    from peft import PeftModel

    stated = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    base = folder / BASE if (folder / BASE).is_dir() else stated
    model = FAMILIES[config.model.family].model_class.from_pretrained(base, dtype=torch.float32)
    if config.adapter.kind == "qlora":
        quantize_parts(model, config.adapter.quantize)
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"peft cannot read the exported adapter ({type(error).__name__}: {error}); the folder was not put in place."
        ) from error
