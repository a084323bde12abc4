"""Values as they were written, brought to the types of the schema: in overrides, in YAML files and in stored configurations.

A key that holds text keeps the characters that were written (2025_01_15, 1e10, 007, true), a whole number is taken for a
float, keys of mappings become numbers if the schema says so, old names become new ones, and a name that the schema does
not have is refused with the one that is meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Collection
from typing import Any

from m4train.config.elsewhere import here
from m4train.config.renamed import MEANT, RENAMED
from m4train.errors import ConfigError


def fields_of(node: Any) -> dict[str, Any]:
    """The types of the fields of a dataclass by their names; nothing for any other type."""
    return _hints(node) if isinstance(node, type) and dataclasses.is_dataclass(node) else {}


_hints = functools.cache(typing.get_type_hints)


def hint_of(schema: Any, path: list[str]) -> Any:
    """The type that the schema gives a key; Any if it leads into something that has none."""
    for name in path:
        if typing.get_origin(schema) in (dict, list):
            schema = typing.get_args(schema)[-1]
        elif dataclasses.is_dataclass(schema):
            schema = fields_of(schema).get(name, Any)
        else:
            return Any
    return schema


def first_open(schema: Any, path: list[str]) -> int | None:
    """How many names of `path` lead to the first mapping with open names on it, itself included; None if there is none."""
    ends = range(1, len(path) + 1)
    return next((end for end in ends if typing.get_origin(hint_of(schema, path[:end])) is dict), None)


def nested(path: list[str], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value


class Reader:
    """Reads values against `schema`. `where` is what messages name first, such as a file; `say` is called with hints;
    `others` gives names that may be meant by a wrong one, besides the keys."""

    def __init__(
        self,
        schema: Any,
        where: str = "",
        say: Callable[[str], None] | None = None,
        others: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._schema, self._where, self._say, self._others = schema, where, say, others

    def read(self, value: Any, written: Any, path: list[str]) -> Any:
        """The value of the key that `path` leads to. `written` has its shape, with the characters of what is not in quotes."""
        return self._read(value, written, hint_of(self._schema, path), path)

    def _read(self, value: Any, written: Any, hint: Any, path: list[str]) -> Any:
        meant = MEANT.get(".".join(path))
        if meant is not None and isinstance(value, (str, bool, int, float)):
            value, written = {meant: value}, {meant: written}
        if isinstance(value, dict):
            return self._mapping(value, written if isinstance(written, dict) else {}, hint, path)
        if isinstance(value, list):
            texts = written if isinstance(written, list) and len(written) == len(value) else value
            of = typing.get_args(hint)[0] if typing.get_origin(hint) is list else Any
            return [self._read(inner, text, of, [*path, str(n)]) for n, (inner, text) in enumerate(zip(value, texts))]
        if value is None or isinstance(value, str):
            return value
        if hint is str or (str in typing.get_args(hint) and typing.get_origin(hint) is not list):
            return written if isinstance(written, str) else str(value)
        return float(value) if hint is float and isinstance(value, int) and not isinstance(value, bool) else value

    def _mapping(self, value: dict, written: dict, hint: Any, path: list[str]) -> dict:
        read: dict[Any, Any] = {}
        hints = fields_of(hint)
        names, of = typing.get_args(hint) if typing.get_origin(hint) is dict else (Any, Any)
        for name, inner in value.items():
            text, key = written.get(str(name), inner), [*path, str(name)]
            if hints:
                key = self._known(key, hints, inner)
                below = key[len(path) + 1 :]  # of a new name that is further down
                name, inner, text = key[len(path)], nested(below, inner), nested(below, text)
                of, key = hints[name], key[: len(path) + 1]
            elif names is int:
                if not str(name).isdigit():
                    raise ConfigError(
                        f"{self._where}{'.'.join(key)} is not a configuration key: {'.'.join(path)} takes whole numbers for keys."
                    )
                name = int(name)
            found = self._read(inner, text, of, key)
            both = isinstance(found, dict) and isinstance(read.get(name), dict)
            read[name] = {**read[name], **found} if both else found
        return read

    def _known(self, key: list[str], hints: dict[str, Any], value: Any) -> list[str]:
        """The key, by its new name. Raises ConfigError if there is none, naming all of it that `value` holds."""
        name = ".".join(key)
        new = RENAMED.get(name)
        if new is not None:
            if self._say:
                self._say(f"{name} is now called {new}: the old name still works, but write the new one.")
            return new.split(".")
        if key[-1] in hints:
            return key
        while isinstance(value, dict) and len(value) == 1:
            ((inner, value),) = value.items()
            key = [*key, str(inner)]
        name = ".".join(key)
        known = all_keys(self._schema, key, self._others())
        raise ConfigError(f"{self._where}{name} is not a configuration key{here(name) or suggest(name, known)}.")


def suggest(word: str, known: Collection[str]) -> str:
    """What may be meant by a wrong word."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        leaf = word.rsplit(".", 1)[-1]
        close = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    return (
        f" (did you mean {close[0]}?)"
        if close
        else " (docs/configuration.md lists all keys, `m4train train --help` the choices)"
    )


def all_keys(node: Any, meant: list[str], others: Collection[str] = (), prefix: str = "") -> list[str]:
    """The keys of the schema and `others`; within lists and mappings with open names, those under the names that `meant` has."""
    keys = list(others)
    for name, hint in fields_of(node).items():
        keys.append(prefix + name)
        inner, rest = f"{prefix}{name}.", meant[1:] if meant[:1] == [name] else []
        if typing.get_origin(hint) in (dict, list) and rest:
            hint, inner, rest = typing.get_args(hint)[-1], f"{inner}{rest[0]}.", rest[1:]
        keys.extend(all_keys(hint, rest, (), inner))
    return keys
