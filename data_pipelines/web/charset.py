"""The bytes of a page to text, by the rules of browsers (WHATWG encoding standard, and the HTML standard, 13.2.3)."""

from __future__ import annotations

import re
from functools import cache

_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xfe\xff", "utf-16-be"), (b"\xff\xfe", "utf-16-le"))
_PRESCAN = 1024  # bytes of a page in which a meta element may name its charset
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
_META = re.compile(rb"<meta[\s/]((?:[^>\"']|\"[^\"]*\"|'[^']*')*)", re.IGNORECASE)
_ATTRIBUTE = re.compile(rb"([^\s=/>\"']+)\s*(?:=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"']+)))?")
_IN_CONTENT = re.compile(rb"charset\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s;\"']+))", re.IGNORECASE)


def decode_page(content: bytes, declared: str | None) -> tuple[str, str]:
    """The text of a page, and the encoding it was read by.

    In this order: a byte order mark, the HTTP header (`declared`), a meta element, and what the bytes look like: UTF-8 if
    they are that, else what a detector says. What is not text in that encoding becomes U+FFFD, as in a browser.
    """
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "replace"), encoding
    found = label_of(declared) or label_in_page(content) or detected(content)
    if found == "replacement":  # ISO-2022-CN and others that are unsafe: one character, as the standard says
        return "\ufffd", found
    return content.decode(_codec(found), "replace").removeprefix("\ufeff"), found


def label_of(declared: str | None) -> str | None:
    """The encoding that a label means by the standard (latin1 is windows-1252); None if it means none."""
    if not declared:
        return None
    label = declared.strip(" \t\n\f\r\"'").lower()
    if label in _REPLACEMENT:
        return "replacement"
    if label in ("x-user-defined", "x-mac-cyrillic", "x-mac-ukrainian"):
        return "mac-cyrillic" if label.startswith("x-mac") else "x-user-defined"
    from resiliparse.parse.encoding import map_encoding_to_html5

    return map_encoding_to_html5(label, fallback_utf8=False)


_REPLACEMENT = ("csiso2022kr", "hz-gb-2312", "iso-2022-cn", "iso-2022-cn-ext", "iso-2022-kr", "replacement")


def label_in_page(content: bytes) -> str | None:
    """The encoding that the first kilobyte of a page names in a meta element; UTF-16 there means UTF-8."""
    for element in _META.finditer(_COMMENT.sub(b" ", content[:_PRESCAN])):
        attributes: dict[bytes, bytes] = {}
        for name, *values in _ATTRIBUTE.findall(element[1]):
            attributes.setdefault(name.lower(), b"".join(values))
        label = attributes.get(b"charset", b"")
        if not label and attributes.get(b"http-equiv", b"").lower() == b"content-type":
            inside = _IN_CONTENT.search(attributes.get(b"content", b""))
            label = b"".join(part or b"" for part in inside.groups()) if inside else b""
        found = label_of(label.decode("latin-1"))
        if found:
            return "utf-8" if found.startswith("utf-16") else found
    return None


def detected(content: bytes) -> str:
    """UTF-8 if the bytes are that (a character cut off at the end aside), else what a detector says of them."""
    try:
        content.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError as error:
        if error.start >= len(content) - 3 and error.reason == "unexpected end of data":
            return "utf-8"
    from resiliparse.parse.encoding import detect_encoding

    found = label_of(detect_encoding(content))
    return "windows-1252" if found in (None, "utf-8") else str(found)  # UTF-8 was tried


@cache
def _codec(encoding: str) -> str:
    """Python's name of an encoding; of one that Python does not know windows-1252, which has a character for most bytes."""
    import codecs

    try:
        return codecs.lookup(encoding).name
    except LookupError:
        return "latin-1" if encoding == "x-user-defined" else "cp1252"
