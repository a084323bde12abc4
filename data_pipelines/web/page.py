"""One page: its HTML to nodes, and what its head says of it. Light: this is what a process that may die imports."""

from __future__ import annotations

from typing import Any
from urllib.parse import urljoin

from data_pipelines.web.dom import Walk
from data_pipelines.web.page_images import PageImages

_METAS = ("robots", "tdm-reservation", "tdm-policy", "googlebot")


def extract(html: str | bytes, url: str, max_width: int) -> dict[str, Any]:
    """Nodes in reading order, and `title`, `language`, and `meta` (robots and data-mining statements) if the page has them.

    `html`: a text, or that in UTF-8.
    """
    from selectolax.lexbor import LexborHTMLParser

    if isinstance(html, str):
        html = html.encode("utf-8", "ignore")
    parser = LexborHTMLParser(html)
    found: dict[str, Any] = {"nodes": []}
    root = parser.root
    if root is None:
        return found
    base = _head(parser, url, found)
    walk = Walk(html, PageImages(base, max_width))
    walk.over(parser.body or root)
    found["nodes"] = walk.nodes
    return found


def _head(parser: Any, url: str, found: dict[str, Any]) -> str:
    """Reads what the head says; returns the address that relative ones begin at."""
    base = ""
    for node in parser.head.iter() if parser.head is not None else ():
        tag = node.tag
        if tag == "title" and "title" not in found:
            title = " ".join(node.text(deep=True).split())
            if title:
                found["title"] = title[:1000]
        elif tag == "meta":
            name = (node.attributes.get("name") or "").strip().lower()
            if name in _METAS:
                metas = found.setdefault("meta", {})
                content = (node.attributes.get("content") or "").strip().lower()[:1000]
                metas[name] = f"{metas[name]}, {content}" if name in metas else content
        elif tag == "base" and not base:
            base = (node.attributes.get("href") or "").strip()
    language = (parser.root.attributes.get("lang") or "").strip()
    if language:
        found["language"] = language[:35]
    try:
        return urljoin(url, base) if base else url
    except ValueError:
        return url
