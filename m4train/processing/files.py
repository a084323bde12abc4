"""The files of a processor folder, in every form that transformers has written."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m4train.errors import ConfigError
from m4train.json_files import read_mapping


@dataclass(frozen=True)
class ProcessorFiles:
    """What a folder says about a processor: image settings, processor settings, and the chat template (or None)."""

    image_processor: dict[str, Any]
    processor: dict[str, Any]
    chat_template: str | None
    named_templates: dict[str, str] = field(default_factory=dict)  # others, by name


# What the processors of transformers 5, which alone nests the settings of images, do without writing it down, by class.
_UNSAID_BY_5: dict[str, dict[str, Any]] = {"Idefics2Processor": {"space_after_image": True}}


def read_json(path: Path) -> Any:
    """The mapping that a JSON file holds, None if it does not exist. Raises ConfigError for a file that holds none."""
    return read_mapping(path) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_processor_files(folder: str | Path) -> ProcessorFiles:
    """Reads image settings (nested in processor_config.json, or preprocessor_config.json), and the chat template.

    The template is looked for in chat_template.jinja, chat_template.json and processor_config.json; the one in
    tokenizer_config.json belongs to the tokenizer. Raises ConfigError if no image settings are found.
    """
    folder = Path(folder)
    processor = read_json(folder / "processor_config.json") or {}
    nested = processor.pop("image_processor", None)
    if nested:
        processor = _UNSAID_BY_5.get(processor.get("processor_class", ""), {}) | processor
    image = nested or read_json(folder / "preprocessor_config.json")
    if image is None:
        raise ConfigError(
            f"{folder} holds neither preprocessor_config.json nor an image_processor in processor_config.json: "
            "point to a folder saved by a processor."
        )
    stored = processor.pop("chat_template", None)
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else None
    older = (read_json(folder / "chat_template.json") or {}).get("chat_template")
    if template and older and templates_of(older)[0] != template:
        warnings.warn(
            f"{folder} holds a chat_template.json that differs from chat_template.jinja, which counts: remove the older file",
            stacklevel=3,
        )
    default, named = templates_of(template or older or stored)
    return ProcessorFiles(image, processor, default, {**named, **named_in(folder)})


def named_in(folder: Path) -> dict[str, str]:
    """The templates that a folder holds by name, as files of their own."""
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


def templates_of(given: Any) -> tuple[str | None, dict[str, str]]:
    """The template called "default", or the only one, and the others by name, of a template, a mapping or a list of them."""
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given}
    if not isinstance(given, dict):
        return given, {}
    return given.get("default"), {name: template for name, template in given.items() if name != "default"}


def write_processor_files(folder: str | Path, files: ProcessorFiles) -> list[Path]:
    """Writes the form that transformers reads from 4.46 to 5.x: flat image settings, processor settings, template.

    Returns the files. Raises ConfigError for a template whose name would be a file elsewhere.
    """
    folder = Path(folder)
    for name in files.named_templates:
        if not name or Path(name).name != name or "\\" in name or name.startswith("."):
            raise ConfigError(f"a chat template is called {name!r}, which is not a name for a file: give it another.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preprocessor_config.json", files.image_processor)
    write_json(folder / "processor_config.json", files.processor)
    written = [folder / "preprocessor_config.json", folder / "processor_config.json"]
    if files.chat_template is not None:
        written += [folder / "chat_template.json", folder / "chat_template.jinja"]
        write_json(written[-2], {"chat_template": files.chat_template})
        written[-1].write_text(files.chat_template, encoding="utf-8")
    for name, template in files.named_templates.items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        written.append(folder / "additional_chat_templates" / f"{name}.jinja")
        written[-1].write_text(template, encoding="utf-8")
    return written
