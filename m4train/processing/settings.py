"""Settings that nobody knows: refused when a caller gives them, kept and named when a file holds them."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from m4train.errors import ConfigError

Call = TypeVar("Call", bound=Callable[..., Any])

# What transformers writes that says nothing of how images or texts are read.
_SILENT = ("processor_class", "auto_map", "_valid_processor_keys", "feature_extractor_type", "video_processor")


class UnknownSetting(ConfigError, TypeError):
    """A setting that there is not: to Python an unknown argument, to the command line a key that cannot work."""


class WrongSize(ConfigError, ValueError):
    """A size in a form that the image processor does not read."""


def no_setting(owner: str, name: str, known: Iterable[str]) -> UnknownSetting:
    """The error for a setting that `owner` has not, which names the one that may have been meant."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}."
    return UnknownSetting(f"{owner} has no setting {name!r}: {hint}")


def known_alone(owner: str, settings: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The settings of a call that `owner` has; of others that are given it warns, as transformers does, and goes on."""
    names = list(known)
    for name, value in settings.items():
        if name not in names and value is not None:
            warnings.warn(f"{no_setting(owner, name, names)} It is ignored.", stacklevel=4)
    return {name: value for name, value in settings.items() if name in names}


def warn_of_unused(owner: str, settings: Mapping[str, Any]) -> None:
    """Warns of the settings of a file that are kept for whoever knows them, and change nothing here."""
    unused = sorted(name for name, value in settings.items() if value is not None and name not in _SILENT)
    if unused:
        warnings.warn(f"{owner} keeps but does not use the settings {', '.join(unused)}", stacklevel=3)


def in_documented_order(preprocess: Call) -> Call:
    """Lets the arguments of `preprocess` after the images be given by position, in the order of `documented_order`.

    Raises TypeError if there are too many, or one is given by name as well.
    """

    @functools.wraps(preprocess)
    def ordered(self: Any, images: Any, *positional: Any, **options: Any) -> Any:
        names = self.documented_order
        if len(positional) > len(names):
            raise TypeError(
                f"{type(self).__name__} takes at most {len(names)} arguments after the images: name the others."
            )
        return preprocess(self, images, **dict(zip(names, positional)), **options)

    return cast("Call", ordered)
