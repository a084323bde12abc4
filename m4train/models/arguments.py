"""Arguments as people give them: by position in the documented order, and some that there are not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

Forward = TypeVar("Forward", bound=Callable[..., Any])

_NAMED = 5  # how many arguments of forward have a position of their own: input_ids to inputs_embeds
OUTPUTS = ("use_cache", "output_attentions", "output_hidden_states")


def by_position(forward: Forward) -> Forward:
    """Lets the arguments of `forward` after inputs_embeds be given by position, in the order of `documented_order`.

    Raises TypeError if there are too many, or one is given by name as well.
    """

    @functools.wraps(forward)
    def ordered(self: Any, *given: Any, **named: Any) -> Any:
        if len(given) <= _NAMED:
            return forward(self, *given, **named)
        names, more = self.documented_order, given[_NAMED:]
        if len(more) > len(names):
            raise TypeError(
                f"{type(self).__name__} takes {_NAMED + len(names)} arguments by position, and {len(given)} are given: name "
                "the others"
            )
        twice = [name for name, _ in zip(names, more) if name in named]
        if twice:
            raise TypeError(f"{type(self).__name__} is given {', '.join(twice)} by position and by name: give it once")
        return forward(self, *given[:_NAMED], **dict(zip(names, more)), **named)

    return cast("Forward", ordered)


def warn_of_ignored(owner: str, names: Iterable[str]) -> None:
    """Warns of arguments that there are not; transformers takes them without a word."""
    if unknown := sorted(names):
        warnings.warn(f"{owner} has no argument {', '.join(unknown)}, and ignores it", stacklevel=4)
