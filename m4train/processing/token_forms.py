"""A token as files and libraries write it, and text as old tokenizers want it."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken


def content_of(token: Any) -> Any:
    """The string of a token, of a dictionary that holds it, or of an AddedToken."""
    return token.get("content") if isinstance(token, dict) else getattr(token, "content", token)


def flags_of(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def clean_up(text: str) -> str:
    """Drops the space before punctuation and contractions, as tokenizers of the BERT days want it."""
    for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1:])
    text = text.replace(" ' ", "'")
    for contraction in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(contraction, contraction[1:])
    return text
