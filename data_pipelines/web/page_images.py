"""The images of a page: which of the many places of its address counts, and what the page says of it."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit, urlunsplit

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

# Where pages that load images late keep the address, before `src`, which then holds a placeholder
_LAZY_SETS = ("data-srcset", "data-lazy-srcset", "data-original-set")
_LAZY = (
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-lazyload",
    "data-hi-res-src",
    "data-full-src",
    "data-orig-file",
    "data-url",
    "data-image",
    "src2",
)
_OTHER_PLACES = frozenset((*_LAZY_SETS, *_LAZY, "srcset"))
_MIN_DATA = 1024  # bytes of an image within the page; smaller ones are placeholders and icons
_MAX_DATA = 10_000_000
_MAX_URL = 4096
_CANDIDATE = re.compile(r"[\s,]*(\S*[^\s,])(?:\s+([^,]*?))?\s*(?:,|$)")
_NOT_READ = ("image/avif", "image/jxl", "image/svg+xml", "image/heic", "image/jp2")  # formats that are not trained on
_SAFE = "%/:=&?~#+!$,;'@()*[]|"
_PIXELS = re.compile(r"\s*(\d{1,6})(?:\.\d+)?(?:px)?\s*$")


class PageImages:
    """Makes nodes of the images of one page, whose relative addresses begin at `base`."""

    def __init__(self, base: str, max_width: int) -> None:
        """`max_width`: of candidates that differ in width, the largest not over this many pixels is taken."""
        self.base, self.max_width = base, max_width
        self._folder = ""
        self._folder = self.address("./x")[:-1]  # what simple names follow
        self._captions: dict[int, str] = {}
        self._last: dict[str, Any] | None = (
            None  # the last image, and whether it may stand for what follows in noscript
        )
        self._placeholder = False

    def caption_of(self, figure: LexborNode, text: str) -> None:
        """Remembers the caption for the images in a figure."""
        if text:
            for image in figure.css("img,amp-img"):
                self._captions.setdefault(image.mem_id, text)

    def of_image(self, image: LexborNode) -> list[dict[str, Any]]:
        """The node of an `img`; none if it has no address that can be fetched."""
        attributes = image.attributes
        return self._made(image, attributes, _candidates(attributes))

    def of_picture(self, picture: LexborNode) -> list[dict[str, Any]]:
        """The node of a `picture`: the candidates of its sources and of its `img` together."""
        image = picture.css_first("img")
        if image is None:
            return []
        found: list[tuple[str, float]] = []
        for source in picture.css("source"):
            attributes = source.attributes
            if (attributes.get("type") or "").strip().lower() not in _NOT_READ:
                for name in (*_LAZY_SETS, "srcset"):
                    found += parse_srcset(attributes.get(name) or "")
        attributes = image.attributes
        return self._made(image, attributes, found + _candidates(attributes))

    def of_noscript(self, noscript: LexborNode, adjacent: bool) -> list[dict[str, Any]]:
        """What a page shows without scripts: the images that scripts would load. One that follows a placeholder replaces it."""
        found: list[dict[str, Any]] = []
        last, placeholder = (self._last, self._placeholder) if adjacent else (None, False)
        for image in noscript.css("img"):
            for node in self.of_image(image):
                if last is not None and node["url"] == last["url"]:
                    continue
                if last is not None and placeholder and not found:
                    node["replaces"] = True
                found.append(node)
        return found

    def _made(
        self, image: LexborNode, attributes: dict[str, Any], candidates: list[tuple[str, float]]
    ) -> list[dict[str, Any]]:
        embedded = None
        url = self._best(candidates) if candidates else ""
        if not url:
            source = attributes.get("src") or ""
            url, embedded = self._embedded(source) if source[:5].lower() == "data:" else (self.address(source), None)
        if not url:
            self._last = None
            return []
        node: dict[str, Any] = {"type": "image", "url": url}
        if (alt := attributes.get("alt")) and (alt := " ".join(alt.split())):
            node["alt"] = alt
        if self._captions and (caption := self._captions.get(image.mem_id)):
            node["caption"] = caption
        if embedded:
            node["content"] = embedded
        for name, kept in (("width", "rendered_width"), ("height", "rendered_height")):
            if (value := attributes.get(name)) and (pixels := _PIXELS.match(value)) and int(pixels[1]):
                node[kept] = int(pixels[1])
        self._last = node
        self._placeholder = not candidates
        return [node]

    def _best(self, candidates: list[tuple[str, float]]) -> str:
        """The largest candidate within the limit that can be fetched, else the smallest above it."""
        order = sorted(
            candidates, key=lambda one: (one[1] > self.max_width, one[1] if one[1] > self.max_width else -one[1])
        )
        return next((url for url in (self.address(source) for source, _ in order) if url), "")

    def _embedded(self, source: str) -> tuple[str, bytes | None]:
        """An image within the page: a name for it and its bytes; none if it is small or broken."""
        head, comma, data = source[5:].partition(",")
        if not comma or len(data) > 2 * _MAX_DATA or head.partition(";")[0].strip().lower() in _NOT_READ:
            return "", None
        try:
            content = unquote_to_bytes(data)
            if head.rstrip().lower().endswith(";base64"):
                content = base64.b64decode(content, validate=False)
        except (binascii.Error, ValueError):
            return "", None
        return ("data:", content) if _MIN_DATA <= len(content) <= _MAX_DATA else ("", None)

    def address(self, source: str) -> str:
        """An absolute http or https address by RFC 3986, without fragment; empty if it is not one."""
        source = source.strip()
        if self._folder and _SIMPLE.fullmatch(source):
            return self._folder + source
        if not source or source[0] == "#" or len(source) > _MAX_URL:
            return ""
        source = source.translate(_REMOVED).replace("\\", "/")
        try:
            parts = urlsplit(urljoin(self.base, source))
            if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
                return ""
            address = quote(urlunsplit(parts._replace(fragment="")), safe=_SAFE)
            return "" if address == self.base else address  # the page itself, such as `http://` without a host
        except ValueError:  # such as an address in brackets that is not one
            return ""


# Names that are joined to the folder of the page and need no escapes: most of them
_SIMPLE = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*\.[A-Za-z0-9]+")
_REMOVED = dict.fromkeys(map(ord, "\t\n\r"))


def _candidates(attributes: dict[str, Any]) -> list[tuple[str, float]]:
    """The addresses of an `img` that are not its `src` alone, each with a width; lazy ones if there are any, then `srcset`."""
    if _OTHER_PLACES.isdisjoint(attributes):
        return []
    found: list[tuple[str, float]] = []
    for name in _LAZY_SETS:
        found += parse_srcset(attributes.get(name) or "")
    found = found or [(attributes[name], 1.0) for name in _LAZY if _is_address(attributes.get(name))][:1]
    return found or parse_srcset(attributes.get("srcset") or "")


def _is_address(value: str | None) -> bool:
    """Whether the attribute of a script looks like an address: some hold JSON, numbers or HTML."""
    value = (value or "").strip()
    return bool(value) and not value.startswith(("data:", "{", "[", "<")) and ("/" in value or "." in value)


def parse_srcset(value: str) -> list[tuple[str, float]]:
    """Candidates of `srcset` with their widths in pixels; a density of 2x counts as 2 and none as 1."""
    found = []
    if value:
        for match in _CANDIDATE.finditer(value):
            url, descriptor = match[1], (match[2] or "").split()
            if url[:5].lower() == "data:":
                continue
            found.append((url, _size(descriptor)))
    return found


def _size(descriptors: list[str]) -> float:
    for word in descriptors:
        if word[-1:] in ("w", "x"):
            try:
                return float(word[:-1])
            except ValueError:
                continue
    return 1.0
