"""`m4train pipeline NAME key=value ...`: raw pages and public datasets to shards, by the steps in `data_pipelines/`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from m4train.config.packages import need
from m4train.errors import ConfigError


def pipeline(arguments: Sequence[str]) -> int:
    """Runs a pipeline, or what is missing of it; returns the exit code."""
    from data_pipelines.frame.config import load_pipeline, presets

    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise ConfigError(f"pipeline needs a NAME: {', '.join(presets())}, or a path to a YAML file.")
    need("datatrove", "m4train pipeline")
    config = load_pipeline(arguments[0], list(arguments[1:]))
    from data_pipelines.frame.runner import run_pipeline

    return run_pipeline(config)


def presets_help() -> str:
    """The presets with the first line of each, and what else is said of pipelines."""
    from data_pipelines.frame.config import presets
    from data_pipelines.steps import STEPS
    from m4train.config.compose import resource_folder

    lines = ["Pipelines:"]
    for name in presets():
        first = (resource_folder("conf") / "pipeline" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        lines += textwrap.wrap(f"{name:<16}{first.lstrip('# ')}", 80, initial_indent="  ", subsequent_indent=" " * 18)
    lines += ["", *textwrap.wrap(f"Steps: {', '.join(STEPS)}", 80, subsequent_indent="  ")]
    lines += ["", "Keys: those of the YAML and the arguments of its steps, as STEP.ARGUMENT=value"]
    return "\n".join([*lines, "      tasks=1  executor=local|slurm|ray  executor.workers=1"])
