"""The model class a folder was saved by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m4train.errors import ConfigError
from m4train.families import FAMILIES
from m4train.hub import HUB_OPTIONS, weight_folder
from m4train.json_files import read_mapping


class AutoModelForImageTextToText:
    """Loads a model with the class its config.json names; not to be made itself."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """The model of a folder or hub model; `options` as in `from_pretrained` of its class.

        Raises:
            ConfigError: there is no such folder or hub model, or it is of a kind m4train does not have.
        """
        pickle = options.get("allow_pickle", False) or options.get("use_safetensors") is False
        hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        folder = weight_folder(pretrained_model_name_or_path, pickle, **hub)
        return model_class_of(folder).from_pretrained(folder, **options)


class AutoModelForVision2Seq(AutoModelForImageTextToText):
    """The same, under the name older documentation gives it."""


def model_class_of(folder: Path) -> Any:
    """The class for the model_type in `folder`/config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"there is no config.json in {folder}: name a folder that holds a saved model")
    model_type = read_mapping(path).get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"{path} has model_type {model_type!r}, but m4train knows {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type].model_class
