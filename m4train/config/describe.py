"""What every configuration key means, read from the schema itself: its type, its default, and the comment at its line.

Shared by `m4train config KEY` and by `docs/configuration.md`, so that neither can differ from the schema.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import tokenize
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from m4train.config import data_schema, schema

# They stand for any name, or any number, in a key that leads through a mapping or a list: data.sources.NAME.weight
NAME, NUMBER = "NAME", "N"


@dataclass(frozen=True)
class Key:
    """One key of the schema, a field of its class `parent`. `group`: it holds further keys."""

    name: str
    type: str
    default: str
    meaning: str
    group: bool
    parent: str

    @property
    def leaf(self) -> str:
        """The name of the field."""
        return self.name.rsplit(".", 1)[-1]


SAME_AS = {"data.validation": "data.sources"}  # groups of equal keys are described once


def all_keys() -> list[Key]:
    """Every key in the order of the schema, a group before the keys inside it."""
    return list(_walk(schema.Config, ""))


def find(name: str) -> list[Key]:
    """The key called `name` and, of a group, all keys inside it; any word matches NAME and N. Empty if there is none.

    A single word that is not a key may be the last word of several (`warmup_steps`): then it is all of them.
    """
    for same, described in SAME_AS.items():
        if name.startswith(f"{same}."):
            name = described + name.removeprefix(same)
    asked, keys = name.split("."), all_keys()
    exact = [key for key in keys if _leads(asked, key.name.split("."))]
    if exact or len(asked) > 1:
        return exact
    named = [key.name for key in keys if key.leaf == name]
    return [key for key in keys if any(f"{key.name}.".startswith(f"{one}.") for one in named)]


def _leads(asked: list[str], key: list[str]) -> bool:
    """Whether `key` is what was asked for, or is inside it."""
    return len(asked) <= len(key) and all(k in (a, NAME, NUMBER) for a, k in zip(asked, key))


def _walk(node: type, prefix: str) -> typing.Iterator[Key]:
    meanings, hints = _comments()[node.__name__], typing.get_type_hints(node)
    for field in dataclasses.fields(node):
        name, hint = prefix + field.name, hints[field.name]
        inner, below = group_of(hint)
        said = meanings.get(field.name, "")
        if inner is None:
            yield Key(name, _type(hint), _default(field), said, False, node.__name__)
            continue
        about = ". ".join(filter(None, (said.rstrip("."), _comments()[inner.__name__].get("", ""))))
        yield Key(name, _type(hint), _default(field) if below else "", about, True, node.__name__)
        if name not in SAME_AS:
            yield from _walk(inner, f"{name}{below}.")


def group_of(hint: Any) -> tuple[type | None, str]:
    """The group that a key of this type holds, and how a key inside it is reached."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), ""
    below = {dict: f".{NAME}", list: f".{NUMBER}"}.get(typing.get_origin(hint), "")
    of = typing.get_args(hint)[-1] if below else None
    return (of, below) if dataclasses.is_dataclass(of) and isinstance(of, type) else (None, "")


def _type(hint: Any) -> str:
    """The type as a reader of YAML calls it: `int or null`, `list of str`, `mapping of str to float`."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return f"mapping of {_type(of[0])} to {_type(of[1])}"
    if origin is list:
        return f"list of {_type(of[0])}"
    if of:
        return " or ".join(_type(one) for one in of)
    if dataclasses.is_dataclass(hint):
        return "group"
    return {type(None): "null", Any: "any"}.get(hint) or hint.__name__


def _default(field: dataclasses.Field) -> str:
    """The default as YAML writes it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return _yaml(value)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@cache
def _comments() -> dict[str, dict[str, str]]:
    """By class of the schema and name of the field: the comment at its lines, or right above it; "" is the class itself."""
    found: dict[str, dict[str, str]] = {}
    for module in (schema, data_schema):
        found |= _comments_of(Path(str(module.__file__)).read_text(encoding="utf-8"))
    return found


def _comments_of(source: str) -> dict[str, dict[str, str]]:
    at_line, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            at_line[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found[node.name] = {"": " ".join((ast.get_docstring(node) or "").split())}
        for line in node.body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            first, last = line.lineno, line.end_lineno or line.lineno
            above = first
            while above - 1 in alone:
                above -= 1
            fields[line.target.id] = " ".join(at_line[n] for n in range(above, last + 1) if n in at_line)
    return found
