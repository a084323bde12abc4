"""`m4train config`: the composed configuration, or what one key means."""

from __future__ import annotations

import difflib
import textwrap

from m4train.commands.arguments import Composed
from m4train.config.describe import Key, all_keys, find
from m4train.config.showing import show
from m4train.errors import ConfigError


def config(composed_as: Composed, arguments: list[str]) -> int:
    """Explains the keys among the arguments, words without `=`; if there are none, prints the configuration that the
    overrides compose. With keys and overrides, says also what the overrides make of the key."""
    if composed_as.cfg is not None or composed_as.info is not None:
        return show(composed_as, arguments)
    asked = [argument for argument in arguments if "=" not in argument and argument[:1] not in ("-", "~", "+")]
    overrides = [argument for argument in arguments if argument not in asked]
    found = [(name, find(name)) for name in asked]
    for name, keys in found:
        if not keys:
            raise ConfigError(f"{name} is not a configuration key{_close(name)}.")
    if overrides or not asked:
        from omegaconf import OmegaConf

        from m4train.config.compose import load_run_config

        composed = OmegaConf.structured(load_run_config(overrides, composed_as.where()))
        if not asked:
            print(OmegaConf.to_yaml(composed, resolve=True), end="")
            return 0
    for name, keys in found:
        _explain(keys)
        shown = name if "." in name else keys[0].name
        value = OmegaConf.select(composed, shown) if overrides else None
        if value is not None:
            here = f"\n{OmegaConf.to_yaml(value)}" if OmegaConf.is_config(value) else f" {value}"
            print(f"\nWith {' '.join(overrides)}:\n\n{textwrap.indent(f'{shown}:{here}'.rstrip(), '    ')}")
    return 0


def _close(name: str) -> str:
    names = [key.name for key in all_keys()]
    close = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(
        name, {key.leaf: key.name for key in all_keys()}, n=1
    )
    return f" (did you mean {close[0]}?)" if close else "; docs/configuration.md lists them"


def _explain(keys: list[Key]) -> None:
    """Prints the first key, then those inside it if it is a group, a line each."""
    from m4train.config.page import choices_of
    from m4train.config.readers import modules_that_read

    readers = modules_that_read(keys)
    for number, key in enumerate(key for key in keys if not _inside(key, keys)):
        print("\n" * bool(number) + key.name)
        print(f"    type:     {key.type}")
        if not key.group:
            print(f"    default:  {key.default}")
        if key.meaning:
            print(textwrap.fill(key.meaning, 80, initial_indent="    meaning:  ", subsequent_indent=" " * 14))
        print(textwrap.fill(f"    read by:  {', '.join(readers[key.name])}", 80, subsequent_indent=" " * 14))
        for choice, about in choices_of(key.name):
            print(
                textwrap.fill(
                    f"{key.name}={choice}  {about}".strip(), 80, initial_indent="    ", subsequent_indent=" " * 8
                )
            )
        for inner in keys:
            if _inside(inner, [key]):
                said = f"{inner.name} ({inner.type}{f', {inner.default}' if inner.default else ''}): {inner.meaning}"
                print(textwrap.fill(said.rstrip(": "), 80, initial_indent="    ", subsequent_indent=" " * 8))


def _inside(key: Key, groups: list[Key]) -> bool:
    return any(group.group and key.name.startswith(f"{group.name}.") for group in groups)
