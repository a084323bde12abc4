"""Where chat templates run: jinja2's sandbox, with a bound on time, on steps and on the size of what is made.

A template comes with a model from anywhere. The sandbox keeps it from reaching anything but its variables; the bounds keep it from
running for ever or filling the memory. Steps are passes of loops and calls; sizes are those of every text and list it makes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

SECONDS = 10.0  # of one rendering
STEPS = 2_000_000
SIZE = 20_000_000  # characters of a text, or entries of a list
_WIDE = re.compile(r"\d{6,}|\*")  # a width in a format that makes megabytes out of nothing
_ITEM, _MADE = "m4train_step", "m4train_made"  # filters that the compiled template calls


class TemplateLimit(SecurityError):
    """A template took too long, or made too much."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox for one template, which is rendered through `rendered`."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: self._bounded(function) for name, function in self.filters.items()}
        self.filters[_ITEM], self.filters[_MADE] = self._counted, self.checked
        self._steps, self._end = 0, float("inf")

    def rendered(self, template: Any, values: dict[str, Any]) -> str:
        """What a template of this environment gives. Raises TemplateLimit, and what jinja2 raises."""
        self._steps, self._end = 0, time.monotonic() + SECONDS
        pieces, size = [], 0
        for piece in template.generate(values):
            self.step()
            size += len(piece)
            self._refuse(size > SIZE, f"writes more than {SIZE:,} characters")
            pieces.append(piece)
        return "".join(pieces)

    def step(self) -> None:
        """Counts one pass of a loop, or one call."""
        self._steps += 1
        self._refuse(self._steps > STEPS, f"takes more than {STEPS:,} steps")
        self._refuse(self._steps % 64 == 0 and time.monotonic() > self._end, f"takes more than {SECONDS:.0f} seconds")

    def checked(self, value: Any) -> Any:
        """`value`, if it is not too large."""
        if isinstance(value, (str, bytes, list, tuple, dict, set)):
            self._refuse(len(value) > SIZE, f"makes a {type(value).__name__} of more than {SIZE:,} entries")
        return value

    def _refuse(self, wrong: bool, what: str) -> None:
        if wrong:
            raise TemplateLimit(f"it {what}")

    def _counted(self, values: Any) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is counted, and neither asked for nor giving anything too large."""

        class Bounded:
            def __call__(_, *args: Any, **options: Any) -> Any:
                self.step()
                self._check_arguments(args, options, function)
                result = function(*args, **options)
                return self._counted(result) if isinstance(result, Iterator) else self.checked(result)

        bounded = Bounded()
        bounded.__dict__.update(getattr(function, "__dict__", {}))  # what jinja2 passes to it first
        return bounded

    def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:
        """Every call that a template makes: of macros, of methods, and of what it is given."""
        self.step()
        self._check_arguments((getattr(function, "__self__", None), *args), options, function)
        return self.checked(super().call(context, function, *args, **options))

    def _check_arguments(self, args: tuple[Any, ...], options: dict[str, Any], function: Any) -> None:
        name = getattr(function, "__name__", "")
        for value in (*args, *options.values()):
            wide = isinstance(value, int) and abs(value) > SIZE and "range" not in name
            self._refuse(wide and not isinstance(value, bool), f"calls {name} with {value}")
            if isinstance(value, str) and "format" in name:
                self._refuse(_WIDE.search(value) is not None, f"formats with {value[:40]!r}")
        if name in ("replace", "do_replace", "join") and len(args) > 1:
            self._refuse(_product(args) > SIZE, f"calls {name} for more than {SIZE:,} characters")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = [value for value in (left, right) if hasattr(value, "__len__")]
        if operator == "*" and sized:
            times = next((value for value in (left, right) if isinstance(value, int)), 1)
            self._refuse(len(sized[0]) * times > SIZE, f"repeats something {times} times")
        if operator == "**" and isinstance(right, (int, float)):
            self._refuse(abs(right) > 1000, f"raises a number to the power {right}")
        if operator == "%" and isinstance(left, str):
            self._refuse(_WIDE.search(left) is not None, f"formats with {left[:40]!r}")
        if operator == "*" and not sized and isinstance(left, int) and isinstance(right, int):
            self._refuse(left.bit_length() + right.bit_length() > 100_000, "multiplies numbers without end")
        return self.checked(super().call_binop(context, operator, left, right))


def _product(args: tuple[Any, ...]) -> int:
    """About the characters that replacing or joining gives."""
    sizes = [len(value) for value in args if hasattr(value, "__len__")]
    longest = max(sizes, default=0)
    return longest * max([size for size in sizes if size != longest] or [1]) if longest > 1000 else 0


class Counting(NodeTransformer):
    """Wraps what loops go over, and what `~` joins, in the filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if not node.recursive:
            node.iter = nodes.Filter(node.iter, _ITEM, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, _MADE, [], [], None, None, lineno=node.lineno)


def compiled(environment: BoundedEnvironment, source: str) -> Any:
    """A template whose loops are counted. Raises what jinja2 raises for a source that does not parse."""
    tree = Counting().visit(environment.parse(source))
    return environment.from_string(tree)
