"""The job that `m4train launch slurm` submits: launch/slurm/train.sbatch with a site's and a run's own, written into run_dir."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m4train.errors import ConfigError

SITE = "M4TRAIN_SITE"  # names another file than launch/slurm/site.yaml of the working folder
FOLDER = "slurm"  # in run_dir
JOB, JOBS, GIT, BAD_NODES, LOGS = "job.sbatch", "jobs", "git.txt", "bad_nodes", "logs"
_DEFAULT_SITE = Path("launch") / "slurm" / "site.yaml"
_OPTIONS_END = "set -euo pipefail\n"  # the first line of the script after its comments
_OWN = "# OWN: "  # the line of the script in whose place a run's own goes
_KINDS = ("pyxis", "apptainer")


def _is_mapping(value: Any, *kinds: type) -> bool:
    return isinstance(value, dict) and all(isinstance(inner, kinds) for inner in value.values())


_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sbatch": (
        lambda value: _is_mapping(value, str, int, float, bool, type(None)),
        "options of sbatch with their values, such as {partition: gpu, exclusive: true}",
    ),
    "environment": (
        lambda value: isinstance(value, list) and all(isinstance(line, str) for line in value),
        "a list of lines, such as [module load cuda]",
    ),
    "container": (lambda value: _is_mapping(value, str), "kind, image and options, each a text"),
}


@dataclass(frozen=True)
class Site:
    """What all jobs of a site share: options of sbatch, lines of shell before anything runs, and a container."""

    sbatch: dict[str, Any] = field(default_factory=dict)
    environment: list[str] = field(default_factory=list)
    container: dict[str, str] = field(default_factory=dict)  # kind (pyxis, apptainer), image, options


def read_site() -> Site:
    """The site file of the user, or a site without anything of its own. Raises ConfigError for keys or kinds it does not have."""
    named = os.environ.get(SITE)
    path = Path(named) if named else _DEFAULT_SITE
    if not path.is_file():
        if named:
            raise ConfigError(f"{SITE} names {named}, which is not a file.")
        return Site()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML ({str(error).splitlines()[0]}).") from error
    known = Site.__dataclass_fields__
    wrong = [key for key in found if key not in known] if isinstance(found, dict) else ["what it holds"]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} is not one of {', '.join(known)}.")
    for key, value in found.items():
        if not _SHAPES[key][0](value):
            raise ConfigError(f"{path}: {key} must be {_SHAPES[key][1]}, but is {value!r}.")
    site = Site(**found)
    if site.container and (site.container.get("kind") not in _KINDS or "image" not in site.container):
        raise ConfigError(f"{path}: container needs kind ({' or '.join(_KINDS)}) and image, but is {site.container}.")
    return site


@dataclass(frozen=True)
class Job:
    """One submission: the run (None: several, or another command), options of sbatch in their order (later ones win), and the
    words after `m4train train`."""

    run_dir: Path | None
    options: list[str]
    arguments: list[str]
    attempts: int = 1
    exclude_bad_nodes: bool = False
    chained: bool = False
    command: str = "train"


def job_text(script: str, site: Site, job: Job) -> str:
    """The sbatch file: the lines of `script` with those of site and run in their places."""
    head, _, rest = script.partition(_OPTIONS_END)
    options = [*_options(site), *job.options]
    lines = "".join(f"#SBATCH {_quoted(option)}\n" for option in options)
    before, _, after = rest.partition(_OWN)
    after = after.partition("\n")[2]
    own = [*site.environment, *_container(site), *_own(job)]
    return head + lines + _OPTIONS_END + before + "\n".join(own) + "\n" + after


def _options(site: Site) -> list[str]:
    """Those of the site; one that is true, or has no value, is a word alone, and one that is false is left out."""
    given = [(name, value) for name, value in site.sbatch.items() if value is not False]
    return [f"--{name}" if value is True or value is None else f"--{name}={value}" for name, value in given]


def _quoted(option: str) -> str:
    """An option whose value sbatch reads as one word, as a shell would. Raises ConfigError for what no line can hold."""
    name, equals, value = option.partition("=")
    if "\n" in option:
        raise ConfigError(f"{name} has a line break, which sbatch cannot take: leave it out.")
    return f"{name}{equals}{shlex.quote(value)}" if equals and re.search(r"[\s#'\"\\]", value) else option


def _container(site: Site) -> list[str]:
    kind, image = site.container.get("kind"), shlex.quote(site.container.get("image", ""))
    options = site.container.get("options", "")
    if kind == "pyxis":
        return [f"through=(--container-image={image} {options})"]
    return [f"inside=(apptainer exec --nv {options} {image})"] if kind == "apptainer" else []


def _own(job: Job) -> list[str]:
    other = [] if job.command == "train" else [f"export M4TRAIN_COMMAND={job.command}"]
    folder = "''" if job.run_dir is None else shlex.quote(str(job.run_dir.resolve()))
    return [
        *other,
        f"run={folder}",
        f"attempts={job.attempts}",
        f"exclude_bad_nodes={'yes' if job.exclude_bad_nodes else ''}",
        f"chained={'yes' if job.chained else ''}",
        f"set -- {shlex.join(job.arguments)}",
    ]


def write_job(folder: Path, text: str, name: str = JOB) -> Path:
    """Writes the sbatch file and the state of the code into the folder `slurm` of a run or a sweep; returns the file."""
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GIT).write_text(git_state(), encoding="utf-8")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def git_state() -> str:
    """The revision of the code and what differs from it; one line if it is not a checkout."""
    package = Path(__file__).resolve().parents[2]
    said = []
    for words in (("rev-parse", "HEAD"), ("status", "--short"), ("diff", "HEAD")):
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True)
        if done.returncode:
            return "not a git checkout\n"
        said.append(done.stdout)
    return "\n".join(said)
