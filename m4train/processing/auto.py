"""The processor and tokenizer of a folder, whatever its model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m4train.errors import ConfigError
from m4train.families import FAMILIES
from m4train.hub import HUB_OPTIONS, PROCESSOR_FILES, WITHOUT_MEANING, model_folder
from m4train.processing.files import read_json
from m4train.processing.processor import Processor
from m4train.processing.tokenizer import Tokenizer


class AutoProcessor:
    """Picks the class of a processor by what its folder says."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **settings: Any,
    ) -> Any:
        """The processor of a folder or hub model. Raises ConfigError if the folder names none of this family."""
        hub = {option: settings.pop(option) for option in HUB_OPTIONS if option in settings}
        folder = model_folder(pretrained_model_name_or_path, PROCESSOR_FILES, revision, cache_dir, **hub)
        return _class_of(folder).from_pretrained(folder, **settings)


class AutoTokenizer:
    """The tokenizer of a folder."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **settings: Any,
    ) -> Tokenizer:
        """The tokenizer of a folder or hub model; `settings` override those of its tokenizer_config.json."""
        hub = {option: settings.pop(option) for option in HUB_OPTIONS if option in settings}
        folder = model_folder(pretrained_model_name_or_path, PROCESSOR_FILES, revision, cache_dir, **hub)
        settings = {name: value for name, value in settings.items() if name not in WITHOUT_MEANING}
        return Tokenizer.from_pretrained(folder, **settings)


def _class_of(folder: Path) -> type[Processor]:
    """Looks for `processor_class` in the processor's files, then for `model_type` in config.json."""
    named = None
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        named = named or (read_json(folder / file) or {}).get("processor_class")
    model_type = (read_json(folder / "config.json") or {}).get("model_type")
    families = {f"{row.name}Processor": row for row in FAMILIES.values()}
    found = families.get(named) if named else FAMILIES.get(model_type or "")
    if found is None:
        said = f"processor_class {named!r}" if named else f"model_type {model_type!r}"
        raise ConfigError(
            f"{folder} has {said}, which is not one of {', '.join(families)}: give a folder of this family."
        )
    return found.load("Processor")
