"""The rules of `filter`, as `conf/pipeline/filters/` states them: what is measured of images, paragraphs and documents, and the
least and the most that each may be. A rule that is not known, or whose score cannot be computed here, is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_pipelines.corpus import measures, scores
from data_pipelines.corpus.measures import Text, common_words, share_in, word_lists
from data_pipelines.corpus.perplexity import perplexity_measure, reference_files, reference_texts
from m4train.errors import ConfigError

IMAGE_RANGES = ("width", "height", "rendered_width", "rendered_height", "aspect")
IMAGE_RULES = ("formats", "url_words", "once", *IMAGE_RANGES)
TEXT_MEASURES: dict[str, Callable[[Text], float]] = {
    "words": measures.word_count,
    "character_repetition": measures.character_repetition,
    "word_repetition": measures.word_repetition,
    "special_characters": measures.special_characters,
    "punctuation": measures.punctuation,
}
LISTS = {"stop_words": "stop", "flagged_words": "flagged", "spam_words": "spam"}
TEXT_RULES = (*TEXT_MEASURES, *LISTS, "common_words", "language", "perplexity")  # from cheap to expensive
DOCUMENT_ONLY = ("images", "nsfw")
MODELS: dict[str, Any] = {
    "words": None,  # YAML file of word lists; null: English
    "punctuation_from": 0,  # tokens of a paragraph from which on its punctuation says something
    "common_words": None,  # file of common words, one a line
    "target_language": "en",
    "language": "fasttext",
    "perplexity": None,  # KenLM file
    "nsfw": "open_nsfw",
    "reference": None,  # texts like those wanted: common words and perplexity are learned from them
    "scores": {},  # name -> module:function
}
_EDGES: dict[str, list[float]] = {
    "words": [4, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000],
    "images": [1, 2, 3, 5, 10, 20, 30, 50],
    "perplexity": [50, 100, 200, 500, 1000, 1500, 2000, 5000, 10000],
    "width": [50, 100, 150, 200, 300, 500, 1000, 2000, 5000, 20000],
    "aspect": [0.25, 0.33, 0.5, 0.67, 1, 1.5, 2, 3, 4],
}
_EDGES |= {"height": _EDGES["width"], "rendered_width": _EDGES["width"], "rendered_height": _EDGES["width"]}


def is_off(value: Any) -> bool:
    """Whether a rule is switched off: YAML reads off as false."""
    return value is None or value is False or value == "off"


@dataclass(frozen=True)
class Rule:
    """A measure and the range that it must be in, both ends included."""

    name: str
    least: float
    most: float
    measure: Callable[..., float] | None = None

    def allows(self, value: float) -> bool:
        return self.least <= value <= self.most

    @cached_property
    def thresholds(self) -> list[float]:
        return [float(bound) for bound in (self.least, self.most) if math.isfinite(bound)]

    @cached_property
    def edges(self) -> list[float]:
        """Borders of the bins of its histogram, the thresholds among them, so that no bin lies on both sides."""
        known = _EDGES.get(self.name)
        if known is None and any(abs(bound) > 1 for bound in self.thresholds):
            top = max(map(abs, self.thresholds))
            known = [top * part / 5 for part in range(-10 if min(self.thresholds) < 0 else 0, 11)]
        inner = [edge for edge in known or [part / 20 for part in range(1, 20)] if edge not in self.thresholds]
        bounds = [
            float(self.least),
            math.nextafter(self.most, math.inf),
        ]  # both are allowed: the bin of the most ends after it
        return sorted({*inner, *(bound for bound in bounds if math.isfinite(bound))})


class Rules:
    """All rules, checked; `image`, `paragraph`, `document` in the order they are applied."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        _known(given, ("image", "paragraph", "document", "models"), "filters")
        self.models = {**MODELS, **(given.get("models") or {})}
        _known(self.models, tuple(MODELS), "filters.models")
        self.references = reference_files(self.models["reference"]) if self.models["reference"] else []
        plugged = tuple(self.models["scores"] or {})
        image, paragraph, document = (given.get(part) or {} for part in ("image", "paragraph", "document"))
        _known(image, (*IMAGE_RULES, *plugged), "filters.image")
        _known(paragraph, (*TEXT_RULES, *plugged), "filters.paragraph")
        _known(document, (*DOCUMENT_ONLY, *TEXT_RULES, *plugged), "filters.document")
        self.formats = tuple(map(str.lower, image.get("formats") or ()))
        self.url_words = tuple(map(str.lower, image.get("url_words") or ()))
        self.once = bool(image.get("once"))
        sizes = [_rule(name, image[name], "filters.image") for name in IMAGE_RANGES if not is_off(image.get(name))]
        self.image = sizes + self._plugged("image", image, plugged)
        self.paragraph = self._texts("paragraph", paragraph) + self._plugged("paragraph", paragraph, plugged)
        self.images = (
            None if is_off(document.get("images")) else _rule("images", document["images"], "filters.document")
        )
        self.document = self._texts("document", document)
        self.nsfw = None if is_off(document.get("nsfw")) else _rule("nsfw", document["nsfw"], "filters.document")
        self.score_nsfw = self._nsfw() if self.nsfw else None
        self.plugged = self._plugged("document", document, plugged)

    def _texts(self, part: str, given: Mapping[str, Any]) -> list[Rule]:
        found = []
        for name in TEXT_RULES:
            if not is_off(given.get(name)):
                rule = _rule(name, given[name], f"filters.{part}")
                found.append(Rule(name, rule.least, rule.most, self._measure(part, name)))
        return found

    def _measure(self, part: str, name: str) -> Callable[[Text], float]:
        models = self.models
        if name in LISTS:
            lists = word_lists(models["words"])
            if LISTS[name] not in lists:
                raise ConfigError(
                    f"filters.{part}.{name} needs the list {LISTS[name]} in {models['words']}: add it, or set it to off."
                )
            return share_in(lists[LISTS[name]])
        if name == "common_words":
            return share_in(self._common_words(part))
        if name == "language":
            return scores.language_measure(models["target_language"], models["language"])
        if name == "perplexity":
            return perplexity_measure(models["perplexity"], self.references)
        if name == "punctuation" and part == "paragraph":
            return measures.punctuation_from(models["punctuation_from"])
        return TEXT_MEASURES[name]

    def _common_words(self, part: str) -> frozenset[str]:
        path = self.models["common_words"]
        if path:
            try:
                with open(path, encoding="utf-8") as file:
                    return frozenset(file.read().lower().split())
            except OSError as error:
                raise ConfigError(
                    f"filters.models.common_words={path} cannot be read ({error}): name a file of words, one a line."
                ) from None
        if self.references:
            return common_words(reference_texts(self.references))
        raise ConfigError(
            f"filters.{part}.common_words needs a list: set filters.models.common_words to a file of words, "
            f"filters.models.reference to texts like those that are wanted, or filters.{part}.common_words=off."
        )

    def _nsfw(self) -> Callable[[bytes], float]:
        model = self.models["nsfw"]
        return scores.open_nsfw() if model == "open_nsfw" else scores.plug_in(str(model), "filters.models.nsfw")

    def _plugged(self, part: str, given: Mapping[str, Any], names: tuple[str, ...]) -> list[Rule]:
        found = []
        for name in names:
            if not is_off(given.get(name)):
                rule = _rule(name, given[name], f"filters.{part}")
                place = self.models["scores"][name]
                found.append(Rule(name, rule.least, rule.most, scores.plug_in(place, f"filters.models.scores.{name}")))
        return found


def _rule(name: str, given: Any, where: str) -> Rule:
    pair = list(given) if isinstance(given, (list, tuple)) else []
    numbers = [value for value in pair if value is None or (isinstance(value, (int, float)) and value is not True)]
    if len(pair) != 2 or len(numbers) != 2 or pair == [None, None]:
        raise ConfigError(f"{where}.{name}={given!r} is not a range: give [least, most], null for no limit, or off.")
    least, most = -math.inf if pair[0] is None else pair[0], math.inf if pair[1] is None else pair[1]
    if least > most:
        raise ConfigError(f"{where}.{name}={given!r} allows nothing: its first number is the smallest allowed.")
    return Rule(name, least, most)


def _known(given: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f", did you mean {close[0]}" if close else f"; there are {', '.join(names)}"
            raise ConfigError(f"{where}.{name} is not a rule{hint}.")
