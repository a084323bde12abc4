"""Packages that only some runs need: a run that needs one which is not installed is refused before a model is built.

They are installed by default, but not everywhere: DeepSpeed and bitsandbytes have no use on many CPU-only machines.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Collection, Iterator
from importlib.util import find_spec

from m4train.config import Config, optimizer_kind
from m4train.config.wandb_keys import mode_of, uses_wandb
from m4train.errors import ConfigError
from m4train.trackers import tracker_kind

_INSTALLED_AS = {"sklearn": "scikit-learn"}  # packages whose name in pip is not the one they are imported by


def check_packages(config: Config, groups: Collection[str]) -> None:
    """Raises ConfigError for the first package that these groups of the configuration need and that is not installed."""
    for group, package, because, instead in _needed(config):
        if group in groups:
            need(package, because, instead)
    online = uses_wandb(config.logging) and mode_of(config.logging.wandb) == "online"
    if "logging" in groups and online and not has_wandb_key():
        raise ConfigError(
            "logging.wandb.mode is online, but there is no W&B key: run `wandb login`, set WANDB_API_KEY, or choose "
            "logging=offline."
        )


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host.partition(":")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def need(package: str, because: str, instead: str = "") -> None:
    """Raises ConfigError if the package is not installed, with what needs it and how to do without; imports nothing."""
    try:
        found = find_spec(package) is not None
    except ImportError:
        found = False
    if not found:
        way_out = f", or choose {instead}" if instead else ""
        name = _INSTALLED_AS.get(package, package)
        raise ConfigError(f"{name} is not installed, but {because} needs it: pip install {name}{way_out}.")


def _needed(config: Config) -> Iterator[tuple[str, str, str, str]]:
    """Group, package, the key that needs it, and what else could be chosen."""
    engine, adapter = config.engine.name, config.adapter.kind
    if engine.startswith("zero"):
        yield "engine", "deepspeed", f"engine.name={engine}", "engine=fsdp2, ddp or single"
    optimizer = optimizer_kind(config.optimizer.name)
    if optimizer.package:
        yield "optimizer", optimizer.package, f"optimizer.name={config.optimizer.name}", "optimizer=adamw"
    if adapter != "none":
        yield "adapter", "peft", f"adapter.kind={adapter}", "adapter=none"
    if adapter == "qlora":
        yield "adapter", "bitsandbytes", "adapter.kind=qlora", "adapter=lora or dora"
    for name in config.logging.trackers:
        package = tracker_kind(name).package
        if package and (name != "wandb" or uses_wandb(config.logging)):
            yield "logging", package, f"logging.trackers={name}", "logging=none"
    for kind, sources in (("sources", config.data.sources), ("validation", config.data.validation)):
        for name, source in sources.items():
            if source.format == "parquet":
                yield "data", "pyarrow", f"data.{kind}.{name}.format=parquet", "another format (m4train data convert)"
