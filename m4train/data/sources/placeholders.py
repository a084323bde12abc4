"""Places for pictures in a text: which strings stand for one, and which are shaped like one although nobody said so.

`<image>` and `<image_2>` are understood in the turns of conversations. Everything else that is shaped like a place for a
picture, a video or a sound is not text to be trained on: the source says with `placeholder` what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from m4train.data.sources.media import speaks_of_other_media, words, words_of
from m4train.errors import ConfigError

LITERAL = "literal"
_DEFAULT = r"<image(?:_(\d+))?>"

_CANDIDATE = re.compile(
    r"<(?P<named>(?:image|img|video|audio)\s*[:=])[^<>\n]{0,200}>"
    r"|(?:[<＜]|&lt;)\|?\s*/?\s*(?P<angle>[^\W\d_][\w :#.\-]{0,39}?)\s*/?\s*\|?(?:[>＞]|&gt;)"
    r"|(?<![\w\])])[\[【]{1,2}\s*/?\s*(?P<square>[^\W\d_][\w :#\-]{0,39}?)\s*[\]】]{1,2}"
    r"|(?<![\w\\$])\{{1,2}\s*(?P<curly>[^\W\d_][\w #\-]{0,39}?)\s*\}{1,2}"
    r"|(?<!\w)(?:__|%%|@@|\#\#)(?P<marks>[^\W\d_][A-Za-z0-9_ ]{0,39}?)(?:__|%%|@@|\#\#)(?!\w)",
    re.IGNORECASE,
)
_MEDIA = words(
    "image images img imgs pic pics picture pictures photo photos video videos vid audio audios media screenshot "
    "screenshots 图片 图像 视频 音频 imagehere imagecontent imgcontext"
)
_MEDIA_IN_ANGLES = _MEDIA | words("vision visual speech sound sounds voice frame frames multimodal mm")
_COMPANIONS = words(
    "placeholder here token tokens pad padding start end begin bos eos of the context patch patches content feature "
    "features soft newline break sep separator row col global special fake around mask embed embedding embeddings "
    "slot input file url path data tag id no number index insert gen feat unk sentinel"
)
# Words of one of them and of companions, written as one.
_FUSED = re.compile(
    "(?:c|begin|start|end|of|the|dummy|fake|unk)*(?:image|img|video|audio|vision)s?"
    "(?:pad|token|patch|start|begin|end|here|placeholder|context|feature|newline|sep)*"
)
_NAMES = words("im_start im_end im_patch boi eoi bov eov ref-object bbox")
_GROUNDING = ("<ref-object>", "<bbox>")
_ROW_AND_COLUMN = re.compile(r"row_\d+_col_\d+")
# References to pictures in the markup of texts.
_MARKUP = re.compile(
    r"!\[[^\]\n]{0,1000}\](?:\([^)\n]{1,4000}\)|\[[^\]\n]{0,200}\])|!\[\[[^\]\n]{1,1000}\]\]"
    r"|<(?:img|image|video|audio|source|picture|embed)\s[^<>=]{0,200}=[^<>]{0,100000}>|(?m:^)[ \t]*\.\. (?:image|figure)::",
    re.IGNORECASE,
)
_START = re.compile(r"[<＜\[【{]|&lt;|__|%%|@@|##")
# One of these is in all that is shaped like a place, which most texts do not hold.
_HINTS = words(
    "ima img im_ pic photo vid audio media screenshot 图 视频 音频 vision visual speech sound voice frame multimodal "
    "![ <source <embed figure:: <mm <|mm boi> eoi> bov> eov> ref-object bbox row_"
)


def stray(text: str) -> str | None:
    """The first thing in a text that is shaped like a place for a medium; None if there is none."""
    lowered = text.lower()
    if not any(hint in lowered for hint in _HINTS):
        return None
    for start in _START.finditer(text):
        match = _CANDIDATE.match(text, start.start())
        if match is not None:
            kind = match.lastgroup or ""
            if kind == "named" or _is_place(match[kind], kind, "|" in match.group()):
                return match.group()
    markup = _MARKUP.search(text)
    return None if markup is None else markup.group()[:200]


def what_to_do(found: str, text: str) -> str:
    """What a placeholder that was `found` in a text stands for, and what to do about it."""
    if found in _GROUNDING:
        what = "stands for what is listed under `objects`, which is not filled in: write the names and the coordinates into the texts"
    elif speaks_of_other_media(found):
        what = "stands for a video or a sound, but only pictures are trained on: leave such records out"
    elif found in ("<img>", "<image>") and f"</{found[1:]}" in text:
        pattern = f"/{found}(?P<image>.*?)</{found[1:]}/"
        what = f"stands for no image of the sample: if the picture is named behind it, set placeholder='{pattern}'"
    else:
        what = "stands for no image of the sample: name it with placeholder=..."
    return f"{what}, or set placeholder=literal if it is text"


def _is_place(inner: str, kind: str, barred: bool) -> bool:
    """`barred`: with the bars of special tokens, as in <|im_end|>, which ends a turn of a conversation."""
    if kind == "angle" and (inner.lower() in _NAMES or _ROW_AND_COLUMN.fullmatch(inner)):
        return not barred or inner.lower() not in ("im_start", "im_end")
    found = words_of(inner)
    media = _MEDIA_IN_ANGLES if kind == "angle" else _MEDIA
    names = [word in media or (kind == "angle" and _FUSED.fullmatch(word) is not None) for word in found]
    if barred:  # as special tokens are written, and nothing else that speaks of media
        return any(names)
    return any(names) and all(name or word in _COMPANIONS for name, word in zip(names, found))


@dataclass(frozen=True)
class Place:
    """Where a picture goes: picture `number`, counted from 0, or the next one; or, if it has a `name`, the one that is named."""

    number: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Placeholders:
    """What stands for a picture in the texts of one source: None if the source does not say."""

    given: tuple[str, ...] | None = None

    @classmethod
    def of(cls, value: Any, key: str = "placeholder") -> Placeholders:
        """From the option: null, "literal", a text, a /pattern/, or a list of them. Raises ConfigError."""
        if value is None:
            return cls()
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(x, str) and x for x in given):
            raise ConfigError(f"{key} is {value!r}, but must be a text, a /pattern/, a list of them, or literal.")
        if LITERAL in given and len(given) > 1:
            raise ConfigError(f"{key} is {list(given)}, but literal stands alone: remove it, or the others.")
        for text in given:
            _pattern_of(text, key)
        try:
            _compiled(tuple(given), True, ())
        except re.error as error:
            raise ConfigError(f"{key} is {list(given)}, whose patterns cannot be used together: {error}.") from None
        return cls(tuple(given))

    @property
    def literal(self) -> bool:
        return self.given == (LITERAL,)

    def split(self, text: str, in_turns: bool, named: tuple[str, ...] = ()) -> list[str | Place]:
        """The text and the places in it, in order. `in_turns`: whether `<image>` is understood without being named;
        `named` are placeholders that the record itself gives, for picture 0, 1, 2 ..."""
        pattern = _compiled(self.given, in_turns, named)
        if pattern is None:
            return [text]
        parts: list[str | Place] = []
        end = 0
        for match in pattern.finditer(text):
            parts += [text[end : match.start()]] if match.start() > end else []
            parts.append(_place(match, named))
            end = match.end()
        return parts + ([text[end:]] if end < len(text) or not parts else [])


def _place(match: re.Match[str], named: tuple[str, ...]) -> Place:
    if named and match["named"] is not None:
        return Place(named.index(match["named"]))
    if (name := match.groupdict().get("image")) is not None:
        return Place(name=name.strip())
    number = next((group for group in match.groups() if group is not None and group.isdigit()), None)
    return Place() if number is None else Place(int(number) - 1)


@lru_cache(256)
def _compiled(given: tuple[str, ...] | None, in_turns: bool, named: tuple[str, ...]) -> re.Pattern[str] | None:
    choices = [rf"(?P<named>{'|'.join(map(re.escape, sorted(named, key=len, reverse=True)))})"] if named else []
    if given is None:
        choices += [_DEFAULT] if in_turns else []
    elif given != (LITERAL,):
        choices += [_pattern_of(text) for text in given]
    return re.compile(rf"\n?(?:{'|'.join(choices)})\n?") if choices else None


def _pattern_of(text: str, key: str = "placeholder") -> str:
    """The regular expression of a placeholder: /pattern/ as it is; in a text, {n} or a number is the picture's number."""
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        try:
            pattern = re.compile(text[1:-1])
        except re.error as error:
            raise ConfigError(f"{key} holds {text!r}, which is not a regular expression: {error}.") from None
        if pattern.match("") is not None:
            raise ConfigError(f"{key} holds {text!r}, which stands for nothing at all: make it match something.")
        return f"(?:{text[1:-1]})"
    before, marked, after = text.partition("{n}")
    if marked:
        return rf"{re.escape(before)}(\d+){re.escape(after)}"
    numbers = re.split(r"(\d+)", text)
    if len(numbers) == 3:
        return f"{re.escape(numbers[0])}({numbers[1]}){re.escape(numbers[2])}"
    return re.escape(text)
