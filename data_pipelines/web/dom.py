"""A page to interleaved nodes in reading order: one walk over its tree that changes nothing in it.

OBELICS simplified the tree again and again until nothing changed; its rules of what to leave out are kept here, but as a table
that one walk looks up, so that a page costs time in proportion to its size. Three are corrected: lists, tables and `pre` are
kept; a form is looked through, for many pages lie within one; `header` is left out only outside of an article. What the tags
say about how texts follow each other is kept as a space, a line end, or an empty line, whichever is the strongest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipelines.web.page_images import PageImages

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


INLINE, SPACE, LINE, PARAGRAPH = 0, 1, 2, 3
_SEPARATORS = ("", " ", "\n", "\n\n")

# Left out with all that is in them
_DROPPED = _words(
    "script style head svg canvas audio video iframe frame frameset object embed applet template nav footer dialog menu area map button "
    "select option optgroup datalist textarea input progress meter rp rt annotation annotation-xml title link meta -comment "
    "!doctype"
)
# Inside of them `header` is the heading of what is read, not that of the site
_CONTENT = frozenset(("article", "main", "section"))
_INLINE = _words(
    "a abbr acronym b bdi bdo big cite code data del dfn em font form i ins kbd label mark math q ruby s samp small span strike strong "
    "sub sup time tt u var wbr mi mn mo mrow msub msup mfrac semantics body html"
)
_LINES = _words("li tr dt dd caption figcaption legend summary thead tbody tfoot")
_CELLS = frozenset(("td", "th"))

_BOILERPLATE = frozenset(("footer", "site-info", "more-link"))  # of a class; the last leads on to the rest of a text
_NAVIGATION = frozenset(
    ("footer", "header", "navigation", "nav", "navbar", "menu")
)  # a whole id, class or title of a div
_ROLES = frozenset(("navigation", "contentinfo", "search", "banner", "menu", "menubar"))


class Walk:
    """The nodes of one page."""

    def __init__(self, html: str, images: PageImages) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.images = images
        self._parts: list[str] = []
        self._border, self._after_br = INLINE, False
        # Only what the page can hold is searched for
        self._searched = ",".join(selector for word, selector in _LEFT_OUT if word in html)
        self._left_out: dict[int, bool] = {}  # element -> whether a text ends there
        self._branching: set[int] = set()  # elements with more below them than text in inline elements
        self._in_content = 0  # open elements of _CONTENT

    def over(self, root: LexborNode) -> None:
        """Walks below `root`, in the order of the text, however deep it is. What holds nothing but text is taken at once."""
        self._look_ahead(root)
        branching, left_out = self._branching, self._left_out
        levels: list[tuple[Any, int, bool]] = [(root.iter(include_text=True), INLINE, False)]
        while levels:
            for node in levels[-1][0]:
                tag = node.tag
                if tag == "-text":
                    self._text(node.text_content or "")
                    continue
                place = node.mem_id
                if place in left_out:
                    self._border = PARAGRAPH if left_out[place] else self._border
                elif place not in branching and tag in _INLINE:
                    self._text(node.text(deep=True))
                elif (level := self._enter(node, tag, place)) is not None:
                    inside = tag in _CONTENT
                    self._in_content += inside
                    levels.append((node.iter(include_text=True), level, inside))
                    break
            else:
                _, level, inside = levels.pop()
                self._in_content -= inside
                if level > self._border:
                    self._border = level
        self.flush()

    def _look_ahead(self, root: LexborNode) -> None:
        """Finds what is left out by its attributes, and which elements have to be walked through."""
        below: list[Any] = root.css(_NOT_INLINE)
        for node in root.css(self._searched) if self._searched else ():
            attributes = node.attributes
            if _is_left_out(attributes, node.tag or ""):
                self._left_out[node.mem_id] = "more-link" in (attributes.get("class") or "")
                below.append(node)
        branching = self._branching
        for node in below:
            parent = node.parent
            while parent is not None:
                place = parent.mem_id
                if place in branching:
                    break
                branching.add(place)
                parent = parent.parent

    def _enter(self, node: LexborNode, tag: str, place: int) -> int | None:
        """The separator that an element stands for, if it has to be walked through; None if it is dealt with."""
        if tag in _DROPPED or (tag == "header" and not self._in_content):
            return None
        if tag == "div" and _is_special_div(node.attributes):
            return None
        if tag in _SPECIAL:
            return self._special(node, tag)
        level = _LEVELS.get(tag, INLINE)
        if level > self._border:
            self._border = level
        if place in self._branching:
            if tag == "figure":
                self._figure(node)
            return level
        self._text(node.text(deep=True))
        if level > self._border:
            self._border = level
        return None

    def _special(self, node: LexborNode, tag: str) -> int | None:
        if tag == "br" or tag == "hr":
            self._line_end(tag)
        elif tag == "noscript":
            self._add(self.images.of_noscript(node, not self._parts))
        elif tag == "pre":
            return self._pre(node)
        else:
            self._add(self.images.of_picture(node) if tag == "picture" else self.images.of_image(node))
        return None

    def _line_end(self, tag: str) -> None:
        level = PARAGRAPH if tag == "hr" or self._after_br else LINE
        self._border = max(self._border, level)
        self._after_br = True

    def _text(self, text: str) -> None:
        words = text.split()
        if not words:
            if text and self._border == INLINE:
                self._border = SPACE
            return
        if self._border == INLINE and text[0].isspace():
            self._border = SPACE
        if self._parts and self._border:
            self._parts.append(_SEPARATORS[self._border])
        self._parts.append(" ".join(words))
        self._border = SPACE if text[-1].isspace() else INLINE
        self._after_br = False

    def _pre(self, node: LexborNode) -> int | None:
        """Keeps the lines of `pre`, unless there are images or line ends as elements in it."""
        self._border = PARAGRAPH
        if node.css_first("img,br") is not None:
            return PARAGRAPH
        text = node.text(deep=True).strip("\r\n").rstrip()
        if text.strip():
            if self._parts:
                self._parts.append(_SEPARATORS[PARAGRAPH])
            self._parts.append(text)
            self._after_br = False
        return None

    def _figure(self, node: LexborNode) -> None:
        caption = node.css_first("figcaption")
        if caption is not None:
            self.images.caption_of(node, " ".join(caption.text(deep=True).split()))

    def _add(self, images: list[dict[str, Any]]) -> None:
        for image in images:
            self.flush()
            if image.pop("replaces", False) and self.nodes and self.nodes[-1]["type"] == "image":
                self.nodes.pop()
            self.nodes.append(image)

    def flush(self) -> None:
        """Makes a node of the text so far."""
        text = "".join(self._parts).strip()
        if text:
            self.nodes.append({"type": "text", "text": text})
        self._parts.clear()
        self._border, self._after_br = INLINE, False


_SPECIAL = frozenset(("br", "hr", "noscript", "pre", "picture", "img", "amp-img", "image"))


_BLOCKS = _words(
    "address article aside blockquote center details dir div dl fieldset figure h1 h2 h3 h4 h5 h6 header hgroup listing main noframes ol p "
    "plaintext section table ul xmp"
)
_LEVELS = {**dict.fromkeys(_BLOCKS, PARAGRAPH), **dict.fromkeys(_LINES, LINE), **dict.fromkeys(_CELLS, SPACE)}
# All but the most frequent inline elements: the fewer names, the quicker it is to find them
_NOT_INLINE = "*:not(span,a,code,em,strong,b)"

# What elements are left out for, besides their names: a word of the page that shows that there can be some -> how to find them
_LEFT_OUT = (
    (" hidden", "[hidden]"),
    ("display", "[style*=display]"),
    ("role", "[role]"),
    ("footer", "[class~=footer]"),
    ("site-info", "[class~=site-info]"),
    ("more-link", "[class~=more-link]"),
)


def _is_left_out(attributes: dict[str, str | None], tag: str) -> bool:
    if "hidden" in attributes and attributes["hidden"] != "until-found":
        return True
    style = attributes.get("style")
    if style and "display:none" in style.replace(" ", "").lower():
        return tag not in ("img", "picture")  # a lazy gallery hides what it has not shown yet
    if attributes.get("role") in _ROLES:
        return True
    return not _BOILERPLATE.isdisjoint((attributes.get("class") or "").split())


def _is_special_div(attributes: dict[str, str | None]) -> bool:
    """Navigation by its exact name, or a date."""
    if not attributes:
        return False
    classes = attributes.get("class")
    for name in (attributes.get("id"), classes, attributes.get("title")):
        if name and name.strip().lower() in _NAVIGATION:
            return True
    if not classes or "date" not in classes.lower():
        return False
    return any("date" in name.replace("_", "-").split("-") for name in classes.lower().split())
