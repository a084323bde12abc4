"""Keys that have a new name. The old one is still taken, in overrides, YAML files and stored configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import MISSING, OmegaConf, open_dict

from m4train.config import Config

RENAMED = {"trainer.save_beside": "trainer.async_checkpoint"}  # old -> new; both are settings within a group


def schema_with_old_keys() -> Any:
    """The schema as an OmegaConf node in which the old keys may be set as well."""
    return with_old_keys(OmegaConf.structured(Config))


def with_old_keys(config: Any) -> Any:
    """Lets the old keys of `config` be set, until `take_old_keys` takes them out again; returns `config`."""
    for old in RENAMED:
        OmegaConf.update(config, old, MISSING, force_add=True)
    return config


def take_old_keys(config: Any, say: Callable[[str], None] | None = None) -> None:
    """Moves what old keys of `config` are set to to the new ones, and says a sentence for each."""
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        node = OmegaConf.select(config, group)
        if node is None or name not in node.keys():  # noqa: SIM118  (`in` leaves out what is missing)
            continue
        if not OmegaConf.is_missing(node, name):
            OmegaConf.update(config, new, node[name])
            if say is not None:
                say(f"{old} is now called {new}: the old name still works, but write the new one.")
        with open_dict(node):
            del node[name]
