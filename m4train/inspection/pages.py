"""The look of every page: one file that opens offline, in light and dark, at any width, with its style and script inside."""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

import m4train


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["held"] = _held
    return environment


def _held(link: Any) -> str:
    """The link of a picture that it holds itself; nothing for one that leads elsewhere, as in files of strangers."""
    return link if str(link).startswith("data:image/") else ""


def render(template: str, **values: Any) -> str:
    """The page that `template`, a file of this folder, makes of the values."""
    return _environment().get_template(template).render(version=m4train.__version__, **values)


def write(path: Path, page: str) -> None:
    """Writes a page, and its folder if that is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def frame(page: str) -> str:
    """A page within another one, as notebooks show values: its style and script touch nothing around it."""
    style = "width: 100%; height: 560px; border: 1px solid #8884; border-radius: 10px"
    return f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts" style="{style}" title="m4train"></iframe>'
