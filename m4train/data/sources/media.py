"""What in a record looks like a picture, a video or a sound, whatever it is called: found by names of fields and by values."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

from m4train.data.documents.sample import json_value
from m4train.errors import BadSample, described

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")


def words(text: str) -> frozenset[str]:
    """The words of a list written as one text."""
    return frozenset(text.split())


def words_of(name: str) -> list[str]:
    """The words of a name, whether they are divided by signs or by capitals, in small letters; numbers are left out."""
    return [word.lower() for word in _WORD.findall(name)]


_STEMS = ("image", "picture", "photo", "video", "audio", "img", "screenshot", "thumbnail")
_MEDIA_WORDS = words(
    "media multimedia mediafile mediafiles mediapath mediaurl pic pics vid vids frame frames pixel "
    "pixels sound sounds speech voice recording recordings wav mp mp3 mp4 jpg jpeg png webp gif tiff pdf"
)
# These too, if their value is a name without blanks, such as fig-a.
_PERHAPS_MEDIA = words(
    "figure figures fig figs diagram diagrams chart charts illustration illustrations graphic graphics sketch sketches "
    "drawing drawings painting paintings poster posters scan scans snapshot snapshots"
)
_NAME = re.compile(r"(?=\S*[\d_./#-])\S+")
_OTHER_MEDIA = words("video videos vid vids audio audios sound sounds speech voice wav mp mp4 mp3 recording recordings")
# What a field says about a medium without holding it, as the last word of its name; the names of a medium among that.
_IDENTIFIERS = words("id ids idx index num number count counts hash sha md phash crc")
_PROPERTIES = _IDENTIFIERS | words(
    "width height w h size sizes score scores rating ratings "
    "similarity sim caption captions description descriptions title titles text texts alt prompt tag tags "
    "label labels class category categories type types kind format mode source license author credit date time "
    "timestamp timestamps duration fps length resolution ratio aspect language lang min max mean correspondence "
    "correspondences dependency safety nsfw aesthetic quality status error message placeholder token tokens"
)
_COUNTS = words("num n nb has is use with total count max min")  # and as its first
_EXTENSIONS = (
    "jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|heic|heif|jp2|j2k|svg|ico|ppm|pgm|pbm|psd|dcm|"
    "mp4|mov|avi|mkv|webm|m4v|mpe?g|flv|wmv|3gp|wav|mp3|flac|ogg|oga|opus|m4a|aac|wma|pdf|djvu"
)
_FILE = re.compile(rf"[^\n]{{0,4000}}\.(?:{_EXTENSIONS})(?:[?#]\S*)?", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(?:image|video|audio|application/(?:pdf|octet-stream))[/;]", re.IGNORECASE)
_CODED = re.compile(r"[A-Za-z0-9+/\-_\s]+={0,2}\s*")
_CODED_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk0", "SUQz", "AAAAI", "T2dnUw", "JVBERi")
_LONG_CODE = 256  # characters of unbroken letters and digits that are not text


def is_empty(value: Any) -> bool:
    """Whether there is nothing in a value, however deep. NaN and infinity are what pandas writes for nothing."""
    if isinstance(value, dict):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(part) for part in value)
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or value is False or (isinstance(value, (str, bytes)) and not value.strip())


def says_nothing(text: str) -> bool:
    """Whether a text is what programs write for a value that is missing, and nobody else for anything."""
    return text.strip().lower() in ("nan", "<na>")


def is_address(name: str, value: Any) -> bool:
    """Whether a field holds the address of a page or file on the web."""
    found = isinstance(value, str) and re.match(r"\s*https?://", value, re.IGNORECASE) is not None
    return found and not {"url", "urls", "uri", "link", "href", "src"}.isdisjoint(words_of(name))


def speaks_of_media(name: str, blind: bool = False) -> bool:
    """Whether a field of this name may hold a medium. `blind`: the sample has no picture, so that its number may stand for it."""
    found = words_of(name)
    if not any(word in _MEDIA_WORDS or any(stem in word for stem in _STEMS) for word in found):
        return False
    if found[-1] in _PROPERTIES:
        return blind and found[-1] in _IDENTIFIERS
    return blind or found[0] not in _COUNTS


def speaks_of_other_media(name: str) -> bool:
    """Whether a name speaks of a video or a sound, which no model here takes."""
    return not _OTHER_MEDIA.isdisjoint(words_of(name))


def medium_in(name: str, value: Any, blind: bool = False, by_name: bool = True) -> str | None:
    """Where in the value of a field a medium seems to be, with what is there; None if none does. `by_name`: whether what
    fields are called says something."""
    found = _found(name, value, blind, by_name, "")
    return None if found is None else f"{found[0]!r} holds {found[1]}"


def looks_like_media(value: Any) -> bool:
    """Whether a value without a name is the name, the address or the content of such a file."""
    return _value(value) is not None


def _found(name: str, value: Any, blind: bool, by_name: bool, where: str) -> tuple[str, str] | None:
    place = ".".join(part for part in (where, name) if part)
    if is_empty(value):
        return None
    if by_name and speaks_of_media(name, blind) and _may_stand_for(name, value, blind):
        return place, described(value)
    if by_name and words_of(name)[-1:] and words_of(name)[-1] in _PERHAPS_MEDIA:
        names = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(each, str) and _NAME.fullmatch(each.strip()) for each in names):
            return place, described(value)
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, (list, tuple)):
        inside = (("", part) for part in value)
    else:
        what = _value(value)
        if what is not None:
            return place, what
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
            try:
                inside = (("", json.loads(value)),)
            except (ValueError, RecursionError):
                return None
    found = (_found(str(inner), part, blind, by_name, place) for inner, part in inside)
    return next((each for each in found if each is not None), None)


def _may_stand_for(name: str, value: Any, blind: bool) -> bool:
    """Whether the value of a field that speaks of media may be one, or stand for the only one there is."""
    if not isinstance(value, (bool, int, float)):
        return True
    return blind and value > 0 and any(stem in name.lower() for stem in _STEMS)


def _value(value: Any) -> str | None:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes" if len(value) else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if _DATA_URL.match(text) or _FILE.fullmatch(text):
        return described(text)
    if len(text) >= 24 and _CODED.fullmatch(text):
        known = text.startswith(_CODED_STARTS) and " " not in text
        mixed = len(text) >= _LONG_CODE and not any(c.isspace() for c in text[:64])
        mixed = mixed and bool(re.search("[0-9]", text) and re.search("[A-Z]", text) and re.search("[a-z]", text))
        return f"base64 of {len(text)} characters" if known or mixed else None
    return None


def written(value: Any) -> Any:
    """A list or an object that is written as a text, as JSON or as Python writes it; what is none as it is. Raises BadSample for
    an object that has a key twice."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json_value(value.strip())
    except json.JSONDecodeError:
        pass
    except RecursionError:
        return value
    except ValueError as error:
        raise BadSample("bad_json", str(error)) from None
    try:
        tree = ast.parse(value.strip(), mode="eval")
        for node in ast.walk(tree):
            keys = (
                [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
            )
            if len(set(keys)) < len(keys):
                raise BadSample("bad_json", f"a key occurs twice in an object: {value[:80]!r}")
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
