"""Which modules read a configuration key, found in the source of the package: nobody has to search for it, and a key that
no module reads is seen.

The groups of the schema are followed as far as names, annotations and attributes go: `config.trainer.max_steps`, a
parameter `options: ImageOptions`, `for source in config.data.sources.values()`. A mapping or list of groups counts as
the group. If an attribute could hold two groups, both are meant.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from m4train.config import data_schema, schema
from m4train.config.describe import Key, group_of

GROUPS = {name: value for name, value in (vars(data_schema) | vars(schema)).items() if dataclasses.is_dataclass(value)}
FIELDS = {name: typing.get_type_hints(group) for name, group in GROUPS.items()}
Groups = set[str]  # the classes of the schema that an expression may hold


def modules_that_read(keys: Iterable[Key]) -> dict[str, list[str]]:
    """By the name of each key, the modules that read it, those that only check it (in `config/`) last."""

    def checks_last(module: str) -> tuple[bool, str]:
        return module.startswith("m4train/config/"), module

    return {key.name: sorted(_readers().get((key.parent, key.leaf), ()), key=checks_last) for key in keys}


@cache
def _readers() -> dict[tuple[str, str], set[str]]:
    """The modules that read each field of each class of the schema."""
    package = Path(schema.__file__).parents[1]
    trees = {
        path.relative_to(package.parent).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }
    attributes = _attributes(trees.values())
    readers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for module, tree in trees.items():
        reads = _Reads(attributes)
        reads.visit(tree)
        for read in reads.found:
            readers[read].add(module)
    return readers


def _attributes(trees: Iterable[ast.AST]) -> dict[str, Groups]:
    """What an attribute of this name holds in any object: the schema's own, what classes annotate or set to a parameter."""
    held: dict[str, Groups] = defaultdict(set)
    for fields in FIELDS.values():
        for name, hint in fields.items():
            group, _ = group_of(hint)
            if group is not None:
                held[name].add(group.__name__)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    held[field.target.id] |= _named(field.annotation)
        elif isinstance(node, ast.FunctionDef):
            given = _parameters(node)
            for line in ast.walk(node):
                if isinstance(line, ast.Assign) and isinstance(line.value, ast.Name):
                    for target in line.targets:
                        if isinstance(target, ast.Attribute):
                            held[target.attr] |= given.get(line.value.id, set())
    return held


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> dict[str, Groups]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {argument.arg: _named(argument.annotation) for argument in arguments}


def _named(annotation: ast.expr | None) -> Groups:
    """The groups that an annotation names."""
    if annotation is None:
        return set()
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name) and node.id in GROUPS}


class _Reads(ast.NodeVisitor):
    """Collects (class, field) of every read in one module."""

    def __init__(self, attributes: dict[str, Groups]) -> None:
        self.attributes = attributes
        self.names: dict[str, Groups] = {}
        self.found: set[tuple[str, str]] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside, self.names = self.names, {**self.names, **_parameters(node)}
        self.generic_visit(node)
        self.names = outside

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts):
                    self._bind(one, self._groups(value))
            else:
                self._bind(target, self._groups(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self._groups(node.iter))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, self._groups(node.iter))
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for generator in node.generators:  # its names come before what is made of them
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found |= {(group, node.attr) for group in self._groups(node.value) if node.attr in FIELDS[group]}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function == "getattr" and isinstance(node.args[1], ast.Constant):
            self.found |= {(group, str(node.args[1].value)) for group in self._groups(node.args[0])}
        if (
            function in ("asdict", "vars") and node.args
        ):  # all of a group goes somewhere; the whole is only written down
            read = self._groups(node.args[0]) - {"Config"}
            self.found |= {(group, name) for group in read for name in FIELDS[group]}
        self.generic_visit(node)

    def _bind(self, target: ast.expr, groups: Groups) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):  # not the `self` of an attribute
                self.names[node.id] = groups

    def _groups(self, node: ast.expr) -> Groups:
        """What an expression holds; the methods, items and elements of a mapping of groups count as the group."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            inside = self._groups(node.value)
            fields = [FIELDS[group][node.attr] for group in inside if node.attr in FIELDS[group]]
            if fields:
                return {group.__name__ for group, _ in map(group_of, fields) if group is not None}
            return inside or self.attributes.get(node.attr, set())
        if isinstance(node, ast.Call):
            return set().union(self._groups(node.func), *map(self._groups, node.args))
        if isinstance(node, (ast.Subscript, ast.Starred)):
            return self._groups(node.value)
        if isinstance(node, (ast.BoolOp, ast.Tuple, ast.List)):
            return set().union(*map(self._groups, node.values if isinstance(node, ast.BoolOp) else node.elts))
        if isinstance(node, ast.BinOp):
            return self._groups(node.left) | self._groups(node.right)
        if isinstance(node, ast.Dict):
            return set().union(*(self._groups(value) for value in node.values))
        if isinstance(node, ast.IfExp):
            return self._groups(node.body) | self._groups(node.orelse)
        return set()
