"""The architecture that a configuration will train, found without a download of weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from m4train import build
from m4train.config import Config
from m4train.config.compose import BEFORE, hint_once, load_config, resource_folder
from m4train.estimation.published import ARCHITECTURES, BACKBONES
from m4train.families import FAMILIES
from m4train.hub import CONFIG_FILES, model_folder
from m4train.json_files import read_mapping
from m4train.parts import NEW_TOKENS

_ADDED = 3  # tokens of every processor that text models lack: around an image, an image, the end of an utterance


def architecture_of(config: Config) -> tuple[Any, torch.dtype | None]:
    """The configuration of the model, and the dtype its weights are stored in (None: fp32): of published models and backbones
    without a download, of others of the hub from their config.json alone, and of a run that is not there yet from its recipe.

    New tokens get their rows in it, and `config` names the first of them in freeze.new_rows_from.
    """
    architecture, stored = _found(config)
    new = len(config.model.texts_of_added) or int(any(rule.part == NEW_TOKENS for rule in config.freeze.rules))
    if new and config.freeze.new_rows_from is None and not getattr(architecture, "additional_vocab_size", 0):
        config.freeze.new_rows_from, config.model.add_tokens = architecture.token_rows, None
        architecture.get_text_config().vocab_size += new
    return architecture, stored


def _found(config: Config) -> tuple[Any, torch.dtype | None]:
    model, kind = config.model, FAMILIES[config.model.family].load("Config")
    if model.pretrained in ARCHITECTURES:
        return kind.from_dict({**ARCHITECTURES[model.pretrained], "model_type": model.family}), torch.bfloat16
    if model.pretrained is not None:
        before = None if Path(model.pretrained).exists() else _before(model.pretrained, config)
        if before is not None:
            return architecture_of(before)[0], None
        folder = model_folder(build.start_folder(model.pretrained), CONFIG_FILES)
        return kind.from_pretrained(folder), _stored(Path(folder))
    if model.vision_pretrained is not None:
        return _assembled(config), None
    if config.data.prepare is not None and not _tokenizer(config).is_file():
        build.prepare_data(config.data)  # makes the tokenizer as well
    return build.build_architecture(config, build.build_processor(config)), None


def _assembled(config: Config) -> Any:
    """The configuration of a model of two backbones."""
    from m4train.models.assemble import assembled_config

    model, path = config.model, _tokenizer(config)
    vision, text = (
        BACKBONES.get(str(name)) or read_mapping(Path(model_folder(str(name), CONFIG_FILES)) / "config.json")
        for name in (model.vision_pretrained, model.text_pretrained)
    )
    added = _ADDED
    if path.is_file():
        from tokenizers import Tokenizer

        rows = {**text, **text.get("text_config", {})}["vocab_size"]
        added = max(0, Tokenizer.from_file(str(path)).get_vocab_size() - rows)
    return assembled_config(FAMILIES[model.family].model_class, vision, text, added_tokens=added, **model.architecture)


def _tokenizer(config: Config) -> Path:
    return Path(config.model.tokenizer or ".") / "tokenizer.json"


def _before(run: str, config: Config) -> Config | None:
    """The configuration whose run is to be kept in `run`: that of the stage before, or the choice of conf/experiment of its name."""
    if BEFORE in vars(config):
        before: Config = vars(config)[BEFORE]()
        hint_once(f"{run} is not there yet: estimated as stage {before.stage} makes it.")
        return before
    name, folder = Path(run).name, resource_folder("conf") / "experiment"
    named = re.compile(rf"^name: {re.escape(name)}$", re.MULTILINE)
    for path in sorted(folder.rglob("*.yaml")):
        if name != config.name and named.search(path.read_text(encoding="utf-8")):
            recipe = path.relative_to(folder).with_suffix("").as_posix()
            hint_once(f"{run} is not there yet: estimated as experiment={recipe} makes it.")
            return load_config([f"experiment={recipe}"], sources=False)
    return None


def _stored(folder: Path) -> torch.dtype | None:
    """What config.json says of the dtype of the weights."""
    said = read_mapping(folder / "config.json")
    name = said.get("dtype") or said.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name))
