"""The job that `m4train launch slurm` submits: launch/slurm/train.sbatch with a site's and a run's own, written into run_dir."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
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
    site = Site(**found)
    if site.container and (site.container.get("kind") not in _KINDS or "image" not in site.container):
        raise ConfigError(f"{path}: container needs kind ({' or '.join(_KINDS)}) and image, but is {site.container}.")
    return site


@dataclass(frozen=True)
class Job:
    """One submission: the run, options of sbatch in their order (later ones win), and the words after `m4train train`."""

    run_dir: Path
    options: list[str]
    arguments: list[str]
    attempts: int
    exclude_bad_nodes: bool
    chained: bool = False


def job_text(script: str, site: Site, job: Job) -> str:
    """The sbatch file: the lines of `script` with those of site and run in their places."""
    head, _, rest = script.partition(_OPTIONS_END)
    options = [f"--{name}={value}" for name, value in site.sbatch.items()] + job.options
    lines = "".join(f"#SBATCH {_quoted(option)}\n" for option in options)
    before, _, after = rest.partition(_OWN)
    after = after.partition("\n")[2]
    own = [*site.environment, *_container(site), *_own(job)]
    return head + lines + _OPTIONS_END + before + "\n".join(own) + "\n" + after


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
    folder = shlex.quote(str(job.run_dir.resolve()))
    return [
        f"run={folder}",
        f"attempts={job.attempts}",
        f"exclude_bad_nodes={'yes' if job.exclude_bad_nodes else ''}",
        f"chained={'yes' if job.chained else ''}",
        f"set -- {shlex.join(job.arguments)}",
    ]


def write_job(job: Job, text: str) -> Path:
    """Writes the sbatch file and the state of the code into run_dir/slurm; returns the file."""
    folder = job.run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GIT).write_text(git_state(), encoding="utf-8")
    path = folder / JOB
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
