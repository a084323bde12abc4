"""How the records of a source are read, and what of each was read: no field goes unread without a word.

A format asks a `Record` for the fields it knows. What nobody asked for is counted, and if it holds a picture, a video or
a sound the sample is bad, until the options of the source say what the field is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from m4train.config import SourceConfig
from m4train.data.documents.learning import says_how_much, weight_of
from m4train.data.sources.conditions import Condition, condition
from m4train.data.sources.media import is_address, is_empty, medium_in, speaks_of_other_media, words
from m4train.data.sources.placeholders import Placeholders
from m4train.errors import BadSample, ConfigError

RECORD_OPTIONS = frozenset({"fields", "where", "placeholder", "missing_images"})
MISSING_IMAGES = ("bad", "drop_image", "drop_sample")
# Fields that records of all kinds have about themselves; they are left, and not worth a word.
KNOWN = words("id _id uid uuid idx key sample_id question_id source dataset split score scores license version")


@dataclass(frozen=True)
class Reading:
    """The options of a source that say how its records are read."""

    fields: Mapping[str, str] = field(default_factory=dict)  # our name of a field -> the name it has in the records
    ignore: tuple[str, ...] = ()  # fields that may go unread, whatever they hold
    where: str | None = None
    placeholders: Placeholders = field(default_factory=Placeholders)
    missing_images: str = "bad"

    @classmethod
    def of(cls, config: SourceConfig, key: str = "data.sources.*") -> Reading:
        """Of the source called `key`. Raises ConfigError for what cannot be understood."""
        for ours, theirs in config.fields.items():
            if ours not in READABLE or not isinstance(theirs, str) or not theirs:
                raise ConfigError(
                    f"{key}.fields is {dict(config.fields)}, but {ours!r} must be one of {', '.join(sorted(READABLE))}, and what it "
                    "is called in the records a name."
                )
        if config.where is not None:
            Condition(config.where, f"{key}.where")
        if config.missing_images not in MISSING_IMAGES:
            raise ConfigError(
                f"{key}.missing_images is {config.missing_images!r}, but must be one of {', '.join(MISSING_IMAGES)}."
            )
        placeholders = Placeholders.of(config.placeholder, f"{key}.placeholder")
        return cls(dict(config.fields), tuple(config.ignore_fields), config.where, placeholders, config.missing_images)

    def check_honoured(self, honours: frozenset[str], form: str, key: str) -> None:
        """Raises ConfigError for an option that means nothing for a format, which honours these."""
        given = {
            "fields": self.fields,
            "where": self.where,
            "placeholder": self.placeholders.given is not None and not self.placeholders.literal,
            "missing_images": self.missing_images != "bad",
        }
        for name, value in given.items():
            if value and name not in honours:
                said = (
                    "its samples say where their images are, so only literal can be said"
                    if name == "placeholder"
                    else "remove it"
                )
                raise ConfigError(f"{key}.{name} is set, but means nothing for the format {form}: {said}.")

    def digest(self) -> str:
        """Names the options, so that an index made with others is stale; empty for those that say nothing."""
        if self == Reading():
            return ""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()

    def ignores(self, path: str, name: str) -> bool:
        return any(fnmatchcase(path, pattern) or fnmatchcase(name, pattern) for pattern in self.ignore)

    def check_where(self, content: Mapping[str, Any]) -> None:
        """Raises BadSample `skipped` for a record that `where` leaves out."""
        if self.where is not None:
            condition(self.where).check(content)

    @property
    def where_fields(self) -> frozenset[str]:
        return condition(self.where).fields if self.where is not None else frozenset()


class Record:
    """An object of a record, of which it is noted what is read. `path` is its place: "" is the record itself."""

    def __init__(self, content: Mapping[str, Any], reading: Reading, path: str = "") -> None:
        self.content, self.reading, self.path = content, reading, path
        self.read: set[str] = set()
        self._left: set[str] = set()
        self._parts: list[Record] = []

    def named(self, name: str) -> str:
        """What a field is called here. In a part of a record the option's name counts if the part has it."""
        theirs = self.reading.fields.get(name, name)
        return theirs if not self.path or theirs in self.content else name

    def get(self, name: str) -> Any:
        """The value of a field, which is read with this; None if there is none."""
        if self._is_another(name):
            return None
        name = self.named(name)
        self.read.add(name)
        return self.content.get(name)

    def holds(self, name: str) -> bool:
        """Whether there is something in a field; it is not read with this."""
        return not self._is_another(name) and not is_empty(self.content.get(self.named(name)))

    def _is_another(self, name: str) -> bool:
        """Whether the records call another field so, as the source says: {question: query} leaves no field `query`."""
        fields = self.reading.fields
        return name not in fields and name in fields.values()

    def first(self, *names: str) -> Any:
        """The value of the first of some fields that holds something; the others stay unread."""
        found = next((name for name in names if self.holds(name)), None)
        return None if found is None else self.get(found)

    def offers(self, name: str) -> bool:
        """Whether there is something in a field that a record can do without: it may be left with ignore_fields."""
        named = self.named(name)
        return self.holds(name) and not self.reading.ignores(f"{self.path}.{named}" if self.path else named, named)

    def weight(self, what: str) -> float:
        """How much this is learnt, 1 if it does not say; `what` it is. Raises BadSample `bad_weight`."""
        weight, read = weight_of(self.about_learning(), what)
        theirs = self.reading.fields
        self.read.update(theirs.get(name, name) if name in theirs else name for name in read)
        return weight

    def about_learning(self) -> dict[str, Any]:
        """The fields that may say how much this is learnt, by our names."""
        ours = {theirs: ours for ours, theirs in self.reading.fields.items() if ours in ("weight", "masked")}
        found = {}
        for name, value in self.content.items():
            renamed, path = ours.get(name, name), f"{self.path}.{name}" if self.path else name
            another = renamed == name and self._is_another(name)
            if says_how_much(renamed) and not another and not self.reading.ignores(path, str(name)):
                found[renamed] = value
        return found

    def part(self, content: Mapping[str, Any], path: str) -> Record:
        """An object in this one, of which it is noted likewise what is read."""
        made = Record(content, self.reading, f"{self.path}.{path}" if self.path else path)
        self._parts.append(made)
        return made

    def leave(self, *names: str) -> None:
        """Says of fields that this format knows them and does not need them."""
        self._left.update(names)

    def _unread(self) -> Iterator[tuple[str, str, Any]]:
        """Path, name and value of what holds something and was neither read nor left."""
        for name, value in self.content.items():
            if name not in self.read and name not in self._left and (value is False or not is_empty(value)):
                yield (f"{self.path}.{name}" if self.path else str(name)), str(name), value
        for part in self._parts:
            yield from part._unread()

    def unread(self, blind: bool) -> tuple[str, ...]:
        """The fields that were not read. `blind`: no picture was. Raises BadSample `unread_media` if one holds a medium."""
        paths = []
        captions = blind and any(self.holds(name) for name in ("caption", "captions"))
        captions = captions or (blind and {"width", "height"} <= {str(name).lower() for name in self.content})
        for path, name, value in self._unread():
            if self.reading.ignores(path, name):
                continue
            known = name in KNOWN
            nothing = value is False or (known and not blind)  # a flag may be named after what a record lacks
            medium = None if nothing else medium_in(name, value, blind, by_name=not known)
            if medium is None and captions and path == name and is_address(name, value):
                medium = f"{name!r} holds {value[:120]!r}"  # of the picture that the text is about
            if medium is not None:
                where = "" if path == name else f"{path.removesuffix('.' + name)}: "
                raise BadSample("unread_media", f"field {where}{medium}, which is not read: {_way_out(name)}")
            paths += [] if known else [path]
        split = self.content.get("split") if not self.path and "split" not in self.reading.where_fields else None
        if isinstance(split, str) and split_of(split) is not None and not self.reading.ignores("split", "split"):
            paths.append(f"{SPLIT}{split_of(split)})")
        parts = list(self._all())
        paths += [absent(name) for name in self.reading.fields.values() if not any(name in p.content for p in parts)]
        return tuple(dict.fromkeys(paths))

    def _all(self) -> Iterator[Record]:
        yield self
        for part in self._parts:
            yield from part._all()


# Fields that say which of the choices of a question is right, next to the answer or instead of it.
ANSWER_KEYS = (
    "answer_idx", "answer_index", "answer_label", "answer_letter", "answer_key", "answerKey", "correct_option",
    "correct_choice", "correct_answer", "correct_answer_index", "correct_choice_idx", "correct_index", "correct_idx", "cop",
)  # fmt: skip
_CHOICE = re.compile(r"[A-Z]|(?:option|choice|op)[\s_-]?(?:[a-zA-Z]|\d{1,2})", re.IGNORECASE)


def is_choice(name: str) -> bool:
    """Whether a field of this name may hold one of the choices of a question: A, option_b, choice1."""
    return _CHOICE.fullmatch(name) is not None and (len(name) > 1 or name.isupper())


_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "evaluation", "evaluation": "evaluation",
}  # fmt: skip
_SPLIT = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})\d{{0,4}}(?![A-Za-z\d])", re.IGNORECASE)
SPLIT = "(of split "  # and its name: what is counted of records that say it, with the fields that are not read


def split_of(name: str) -> str | None:
    """The split of a dataset that a name begins with, as train or validation; None for another name."""
    found = _SPLIT.match(name)
    return None if found is None else _SPLITS[found[1].lower()]


def _way_out(name: str) -> str:
    if speaks_of_other_media(name):
        return f"only pictures are trained on, so leave it with ignore_fields=[{name}]"
    if name in PICTURES:
        return f"a record of this form has its pictures elsewhere, so put it there, or leave it with ignore_fields=[{name}]"
    return f"say what it is with fields={{image: {name}}}, or leave it with ignore_fields=[{name}]"


TURNS = ("messages", "conversations", "conversation", "texts")
PAIRS = (  # fields that ask, fields that answer: those of the first that fits, then those of all others
    (("instruction",), ("output", "response", "outputs")),
    (("query",), ("response",)),
    (("prompt",), ("completion", "chosen", "response", "answer", "output")),
    (("question",), ("answer", "answers")),
    (("problem",), ("solution", "answer")),
    (("input",), ("output", "preferred_output")),
    (("inputs",), ("outputs",)),
    (("prefix",), ("suffix",)),
)
ANSWERS = tuple(dict.fromkeys(name for _, names in PAIRS for name in names))
CAPTIONS = ("caption", "captions", "text")
TITLE = "title"  # the caption of a picture that has no other
PICTURES = ("images", "image")
# What a picture is called in records that have neither: of a table the column is taken, elsewhere a field that holds one.
PICTURE_COLUMNS = (
    "file_name", "file_names", "filename", "image_path", "image_file", "image_name", "image_url", "img_path", "img", "photo",
    "picture", "filepath", "file_path", "path", "file", "image_filename", "img_name", "img_file", "imgname", "image_bytes",
    "image_base64", "image_base64_str", "image_data",
)  # fmt: skip
QUESTIONS = "questions"  # several of one picture, whose `answers` are a list of as many
_OTHERS = words(
    "questions system input history choices options label chosen general_metadata url role content user assistant source "
    "context passage hint weight masked title"
)
BEFORE = ("context", "passage", "hint")  # what belongs to a question, in the order in which it comes before it
SYSTEM = ("system", "system_prompt", "system_message")
CHOICES = ("choices", "options", "answer_choices", "answer_options", "mc_options", "multiple_choices", "candidates")
READABLE = (
    frozenset((*TURNS, *CAPTIONS, *PICTURES, *SYSTEM, *CHOICES))
    | _OTHERS
    | {n for pair in PAIRS for names in pair for n in names}
)


def is_column(name: str, reading: Reading) -> bool:
    """Whether a field of this name may be read of a record."""
    read = {reading.fields.get(field, field) for field in READABLE} | KNOWN | reading.where_fields
    return name in read or name in PICTURE_COLUMNS or says_how_much(name) or is_choice(name) or name in ANSWER_KEYS


def absent(name: str) -> str:
    """What is counted, instead of a field that is not read, for a field that the options name and a sample does not have."""
    return f"(no field {name})"


def asking() -> tuple[str, ...]:
    """The fields by which records of a question and an answer are known."""
    return (*(name for asked, _ in PAIRS for name in asked), "chosen")
