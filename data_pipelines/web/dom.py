"""A page to interleaved nodes in reading order: one walk over its tree that changes nothing in it.

OBELICS simplified the tree again and again until nothing changed; its rules of what to leave out are kept here, but as a table
that one walk looks up, so that a page costs time in proportion to its size. Three are corrected: lists, tables and `pre` are
kept; a form is looked through, for many pages lie within one; `header` is left out only outside of an article. What the tags
say about how texts follow each other is kept as a space, a line end, or an empty line, whichever is the strongest.
"""

from __future__ import annotations

import re
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
_BLOCKS = _words(
    "address article aside blockquote center details dir dl fieldset h1 h2 h3 h4 h5 h6 hgroup listing main noframes ol p plaintext section "
    "table ul xmp"
)
_LINES = _words("li tr dt dd caption figcaption legend summary thead tbody tfoot")
_CELLS = frozenset(("td", "th"))
_SPECIAL = frozenset(("br", "hr", "noscript", "pre", "picture", "img", "amp-img", "image"))
_LOOKED_AT = frozenset(("div", "figure", "header"))  # paragraphs, if a look at them does not say otherwise
_TEXT, _LEAVE, _LOOK = -2, -1, 9
# What to do about a tag: one of these, or the separator that it stands for. Looked up for every node, and so the only table
_KINDS = {
    "-text": _TEXT,
    **dict.fromkeys(_DROPPED, _LEAVE),
    **dict.fromkeys(_CELLS, SPACE),
    **dict.fromkeys(_LINES, LINE),
    **dict.fromkeys(_BLOCKS, PARAGRAPH),
    **dict.fromkeys((*_SPECIAL, *_LOOKED_AT), _LOOK),
}

_SIMPLE = _INLINE | {"-comment"}  # text in them can be taken with that of what they are in

# Of a class; more-link leads on to the rest of a text, and headerlink is the paragraph mark after a heading of documentation
_BOILERPLATE = frozenset(("footer", "site-info", "more-link", "headerlink"))
_NAVIGATION = frozenset(
    ("footer", "header", "navigation", "nav", "navbar", "menu")
)  # a whole id, class or title of a div
_ROLES = frozenset(("navigation", "contentinfo", "search", "banner", "menu", "menubar"))


class Walk:
    """The nodes of one page."""

    def __init__(self, html: bytes, images: PageImages) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.images = images
        self._parts: list[str] = []
        self._border, self._after_br = INLINE, False
        # Only what the page can hold is searched for
        small = html.lower()
        self._searched = ",".join(
            selector for word, shown, selector in _LEFT_OUT if word in small and (not shown or shown.search(small))
        )
        self._left_out: dict[int, bool] = {}  # element -> whether a text ends there
        self._branching: set[int] = set()  # elements with more below them than text in inline elements
        self._in_content = 0  # open elements of _CONTENT

    def over(self, root: LexborNode) -> None:
        """Walks below `root`, in the order of the text, however deep it is. What holds nothing but text is taken at once."""
        self._look_ahead(root)
        branching, left_out, kinds = self._branching, self._left_out, _KINDS
        levels: list[tuple[Any, int, bool]] = [(root.iter(include_text=True), INLINE, False)]
        while levels:
            for node in levels[-1][0]:
                tag = node.tag
                level = kinds.get(tag, INLINE)
                if level == _TEXT:
                    # Most texts are the white space between two blocks
                    if not self._border or not node.is_empty_text_node:
                        self._text(node.text_content or "")
                    continue
                place = node.mem_id
                if place in left_out:
                    self._border = PARAGRAPH if left_out[place] else self._border
                    continue
                if level == _LOOK:
                    level = self._looked_at(node, tag)
                if level == _LEAVE:
                    continue
                if level > self._border:
                    self._border = level
                if place in branching:
                    inside = tag in _CONTENT
                    self._in_content += inside
                    levels.append((node.iter(include_text=True), level, inside))
                    break
                self._text(node.text(deep=True))
                if level > self._border:
                    self._border = level
            else:
                _, level, inside = levels.pop()
                self._in_content -= inside
                if level > self._border:
                    self._border = level
        self.flush()

    def _look_ahead(self, root: LexborNode) -> None:
        """Finds what is left out by its attributes, and which elements have to be walked through."""
        branching = self._branching
        below = [node for node in root.traverse() if node.tag not in _SIMPLE]
        for node in root.css(self._searched) if self._searched else ():
            attributes = node.attributes
            if _is_left_out(attributes, node.tag or ""):
                self._left_out[node.mem_id] = "more-link" in (attributes.get("class") or "")
                below.append(node)
        for node in below:
            parent = node.parent
            while parent is not None:
                place = parent.mem_id
                if place in branching:
                    break
                branching.add(place)
                parent = parent.parent

    def _looked_at(self, node: LexborNode, tag: str) -> int:
        """The separator that an element stands for, or that it is left out, or dealt with."""
        if tag == "div":
            return _LEAVE if _is_special_div(node.attributes) else PARAGRAPH
        if tag == "img":
            self._add(self.images.of_image(node))
        elif tag == "br" or tag == "hr":
            self._line_end(tag)
        elif tag == "figure":
            self._figure(node)
            return PARAGRAPH
        elif tag == "header":
            return PARAGRAPH if self._in_content else _LEAVE
        elif tag == "noscript":
            self._add(self.images.of_noscript(node, not self._parts))
        elif tag == "pre":
            return self._pre(node)
        else:
            self._add(self.images.of_picture(node) if tag == "picture" else self.images.of_image(node))
        return _LEAVE

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

    def _pre(self, node: LexborNode) -> int:
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
        return _LEAVE

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


# What elements are left out for, besides their names: a word of the page, and what around it, in small letters, shows that there can be
# some -> how to find them
_LEFT_OUT = (
    (b"hidden", re.compile(rb"hidden(?<=[\s\"'/]hidden)[\s=/>]"), "[hidden]"),
    (b"display", re.compile(rb"display\s*:\s*none"), "[style*=display i]"),
    (b"role", re.compile(rb"role\s*=\s*[\"']?(?:navigation|contentinfo|search|banner|menu)"), "[role]"),
    (b"footer", None, "[class~=footer]"),
    (b"site-info", None, "[class~=site-info]"),
    (b"more-link", None, "[class~=more-link]"),
    (b"headerlink", None, "[class~=headerlink]"),
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
