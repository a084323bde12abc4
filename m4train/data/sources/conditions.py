"""The small language of `where`: which records of a source are used, said about their fields.

Comparisons (also chained), `and`, `or`, `not`, `in`, `+ - * /`, constants, lists of them, dots into objects, and
min, max, mean, len. A comparison with a list holds if it holds for each of its values; with a field that is missing or
null it does not hold.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from m4train.errors import BadSample, ConfigError, described

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_SUMS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "min": min,
    "max": max,
    "mean": lambda values: sum(values) / len(values),
    "len": len,
}
_ALLOWED: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Compare, ast.Call),
    *(ast.Name, ast.Load, ast.Attribute, ast.Constant, ast.List, ast.Tuple, ast.In, ast.NotIn),
    *_COMPARISONS,
    *_SUMS,
)


class Condition:
    """One checked expression. Raises ConfigError for what the language does not know."""

    def __init__(self, text: str, key: str = "where") -> None:
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"{key} is {text!r}, which is not an expression: {error}.") from None
        for node in ast.walk(tree):
            if not isinstance(node, _ALLOWED):
                raise ConfigError(f"{key} is {text!r}, but {type(node).__name__} is not part of its language.")
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else "?"
                if name not in _FUNCTIONS or len(node.args) != 1 or node.keywords:
                    raise ConfigError(f"{key} is {text!r}, but may only call {', '.join(_FUNCTIONS)} with one field.")
        self._body = tree.body
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        self.fields = frozenset(
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called
        )
        if not self.fields:
            raise ConfigError(f"{key} is {text!r}, but names no field: remove it, or name one.")
        self.text = text

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises BadSample `skipped` for a record that is not used, `bad_where` where its values cannot be compared."""
        try:
            used = bool(_value(self._body, record))
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise BadSample("bad_where", f"`where` ({self.text}) cannot be applied to its fields: {error}") from None
        if not used:
            shown = ", ".join(f"{name} is {described(record.get(name), 60)}" for name in sorted(self.fields))
            raise BadSample("skipped", f"`where` ({self.text}) leaves it out: {shown}")


@lru_cache(64)
def condition(text: str) -> Condition:
    """The condition of a text, parsed once."""
    return Condition(text)


def _value(node: ast.expr, record: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return record.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = _value(node.value, record)
        return inner.get(node.attr) if isinstance(inner, Mapping) else None
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(part, record) for part in node.elts]
    if isinstance(node, ast.BoolOp):
        parts = (bool(_value(part, record)) for part in node.values)
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, record)
        return not inner if isinstance(node.op, ast.Not) else None if inner is None else -inner
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, record), _value(node.right, record)
        return None if left is None or right is None else _SUMS[type(node.op)](left, right)
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        inner = _value(node.args[0], record)
        return None if inner is None or (node.func.id != "len" and not inner) else _FUNCTIONS[node.func.id](inner)
    assert isinstance(node, ast.Compare)
    sides = [_value(node.left, record), *(_value(part, record) for part in node.comparators)]
    return all(_holds(op, left, right) for op, left, right in zip(node.ops, sides, sides[1:]))


def _holds(op: ast.cmpop, left: Any, right: Any) -> bool:
    if isinstance(op, (ast.In, ast.NotIn)):
        if left is None or right is None:
            return False
        return (left in right) is isinstance(op, ast.In)
    compare = _COMPARISONS[type(op)]
    equal = isinstance(op, (ast.Eq, ast.NotEq))
    if equal and (left is None or right is None):
        return compare(left, right)  # `field == None` asks for what is missing
    if left is None or right is None:
        return False
    if isinstance(left, (list, tuple)) and not isinstance(right, (list, tuple)):
        return bool(left) and all(_holds(op, part, right) for part in left)
    if isinstance(right, (list, tuple)) and not isinstance(left, (list, tuple)):
        return bool(right) and all(_holds(op, left, part) for part in right)
    return bool(compare(left, right))
