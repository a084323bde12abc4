"""The arguments of a step: which there are, whether the values of a configuration fit, and the step made of them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from typing import TYPE_CHECKING, Any

from data_pipelines.steps import STEPS
from m4train.errors import ConfigError

if TYPE_CHECKING:
    from data_pipelines.frame.step import Step


def step_class(key: str, options: dict[str, Any]) -> type[Step]:
    """The class of a step: that of `step` among its options, else of its name. Raises ConfigError if there is none."""
    name = str(options.get("step", key))
    place = STEPS.get(name, name if ":" in name else "")
    if not place:
        close = difflib.get_close_matches(name, list(STEPS), n=1)
        hint = f", did you mean {close[0]}" if close else ""
        raise ConfigError(
            f"{name} is not a step{hint}; there are {', '.join(STEPS)}, or step: module:class of your own."
        )
    module, _, kind = place.partition(":")
    try:
        return getattr(importlib.import_module(module), kind)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("data_pipelines", module.partition(".")[0]):
            raise ConfigError(f"step {key}: there is no module {error.name}.") from error
        raise ConfigError(
            f"{package} is not installed, but step {key} needs it: pip install 'm4train[pipelines]'."
        ) from error
    except AttributeError:
        raise ConfigError(f"step {key}: {module} has no {kind}.") from None


def parameters(kind: type[Step]) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a step by name, with their annotations."""
    hints = typing.get_type_hints(kind.__init__)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(kind).parameters.items()
    }


def check_options(key: str, options: dict[str, Any]) -> None:
    """Raises ConfigError for an argument that the step does not have, that it needs, or that is of the wrong type."""
    known = parameters(step_class(key, options))
    for name, value in options.items():
        if name == "step":
            continue
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f", did you mean {key}.{close[0]}" if close else f"; it has {', '.join(known)}"
            raise ConfigError(f"{key}.{name} is not an argument of the step{hint}.")
        if not fits(value, known[name].annotation):
            raise ConfigError(
                f"{key}.{name}={value!r} is of the wrong type: it takes {_words(known[name].annotation)}."
            )
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(f"{key}.{name} is not set: add {key}.{name}=...")


def build_step(key: str, options: dict[str, Any]) -> Step:
    """The step that a stage calls `key`. Raises ConfigError as `check_options`, and what the step itself refuses."""
    check_options(key, options)
    step = step_class(key, options)(**{name: value for name, value in options.items() if name != "step"})
    step.ledger.name = key
    return step


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML is of the type that an annotation names; a whole number is a float, too."""
    if hint is Any:
        return True
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, tuple) or hint in (list, tuple):
        return isinstance(value, (list, tuple)) and (not inner or all(fits(one, inner[0]) for one in value))
    if origin is dict or hint is dict:
        return isinstance(value, dict) and (not inner or all(fits(one, inner[1]) for one in value.values()))
    if hint in (None, type(None)):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")  # type: ignore[return-value]
