"""The model families, one row each. Everything that lists families derives it from `FAMILIES`.

To add a family, add a row here, the two modules it names, and a YAML in `conf/model/`. Imports nothing of m4train.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Family(NamedTuple):
    """Where the classes of a family are. Their names are `name` and what they are, such as Idefics3Processor."""

    model_type: str  # in config.json, and the value of model.family
    name: str
    head: str  # how the name of the class with the language-model head ends
    models: str  # the module that holds NAMEModel and NAME + head
    processor: str  # the module that holds NAMEProcessor
    image_processor: str  # the module that holds NAMEImageProcessor
    image_layout: str  # how the model takes images: frames, patches or cross, see data/documents/image_layout.py
    config: str = "m4train.models.model_configs"  # the module that holds NAMEConfig
    also: tuple[str, ...] = ()  # further public names of `image_processor`

    def homes(self) -> dict[str, str]:
        """Every public name of the family and the module it is in."""
        models = {
            f"{self.name}Config": self.config,
            f"{self.name}Model": self.models,
            self.name + self.head: self.models,
        }
        return {**models, **self.processing_homes()}

    def processing_homes(self) -> dict[str, str]:
        """Those of its names that need no torch."""
        images = dict.fromkeys((f"{self.name}ImageProcessor", *self.also), self.image_processor)
        return {f"{self.name}Processor": self.processor, **images}

    def load(self, kind: str) -> Any:
        """One of its classes: Config, Model, Processor, ImageProcessor, or the head's ending."""
        name = self.name + kind
        return getattr(importlib.import_module(self.homes()[name]), name)

    @property
    def model_class(self) -> Any:
        """The class with the language-model head."""
        return self.load(self.head)


def _row(model_type: str, name: str, models: str, layout: str, **more: Any) -> Family:
    """A row of this package, whose modules in `models/` and `processing/` have the same name."""
    processing = f"m4train.processing.{models}"
    values = {
        "head": "ForConditionalGeneration",
        "processor": processing,
        "image_processor": f"{processing}_images",
        **more,
    }
    return Family(model_type, name, models=f"m4train.models.{models}", image_layout=layout, **values)


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _row("idefics", "Idefics", "idefics", "cross", head="ForVisionText2Text"),
        _row("idefics2", "Idefics2", "idefics2", "patches", also=("Idefics2ImageProcessorFast",)),
        _row("idefics3", "Idefics3", "idefics3", "frames"),
        _row("smolvlm", "SmolVLM", "idefics3", "frames"),
    )
}
