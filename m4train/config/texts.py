"""Overrides of keys that hold text, such as names and paths: what looks like a number or like syntax stays text."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from m4train.config import Config

_JSON = ("model.add_tokens",)  # mappings whose keys may hold characters that Hydra's cannot, such as "<box>"
_SYNTAX = set("'\"{}[]()")  # a value with one of them is what Hydra says it is: a list, a mapping, or wrong


def as_text(override: str) -> str:
    """The override with its value in quotes if its key holds text and Hydra would read something else in it: so 2025_01_15 is a
    name, and lr=0.1 a folder."""
    key, equals, value = override.partition("=")
    value = value.strip()
    if key in _JSON and value.startswith("{") and _is_json(value):
        return f"{key}='{_escaped(value.replace(chr(39), chr(92) + chr(39)))}'"
    if not equals or not value or value == "null" or _SYNTAX & set(value) or not _holds_text(key.split(".")):
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)  # a,b is a sweep, and lr=1,seed=2 cannot be read
        plain = "," in value or isinstance(parsed.value(), str)
    except HydraException:
        plain = False
    return override if plain else f'{key}="{_escaped(value)}"'


def text_of(override: str) -> str:
    """The value of an override of a key that holds text, as every command reads it; as it is written if it is not one."""
    try:
        return str(OverridesParser.create().parse_override(as_text(override)).value())
    except HydraException:
        return override.partition("=")[2]


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except ValueError:
        return False
    return True


def _escaped(value: str) -> str:
    end = len(value) - len(value.rstrip("\\"))
    return value + "\\" * end  # a quote is never in it, so that only backslashes before the closing one count


def _holds_text(path: list[str]) -> bool:
    hint: Any = Config
    for name in path:
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(name)
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            return False
    return hint is str or (str in typing.get_args(hint) and typing.get_origin(hint) is not list)
