"""From `conf/pipeline/` or a YAML of one's own, and overrides, to one checked pipeline. Composed by Hydra, as training is."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipelines.frame.options import check_options, parameters, step_class
from m4train.config.compose import explained, parsed_override, resource_folder
from m4train.errors import ConfigError

EXECUTORS = ("local", "slurm", "ray")
PREVIOUS = "previous"
_ROOT = "_pipeline"


@dataclass
class ExecutorConfig:
    """Where the ranks of a stage run."""

    kind: str = "local"  # local: processes of this machine; slurm: jobs of an array; ray: a Ray cluster
    workers: int = (
        1  # ranks at the same time; 1 and local: one after the other, in this process; slurm: -1 for no limit
    )
    cpus_per_task: int = 1  # slurm, ray: cores of a rank
    mem_per_cpu_gb: float = 2.0  # slurm, ray: GB of memory for each of them
    time: str = "24:00:00"  # slurm: limit of a job
    partition: str = ""  # slurm: must be given
    qos: str = ""  # slurm: empty: that of the account
    tasks_per_job: int = (
        1  # slurm: ranks one after the other in a job, so that an array is not longer than the cluster allows
    )
    max_array_size: int = 1001  # slurm: jobs of an array, see MaxArraySize in slurm.conf
    env_command: str = ""  # slurm: run in a job before anything else; empty: the Python that submits is found again
    sbatch_args: dict[str, Any] = field(default_factory=dict)  # slurm: further options of sbatch, such as account: NAME
    wait: bool = False  # slurm: wait for the jobs and end with their result, instead of only submitting them
    address: str = "local"  # ray: address of a cluster; local: start one on this machine


@dataclass
class StageConfig:
    """Steps that run one after the other on every document, each rank with its share of the documents."""

    steps: dict[str, Any]  # in order: name of a step -> its arguments; `step:` among them if the name is another one
    tasks: int | None = None  # number of ranks; null: that of the pipeline
    # the stage whose documents it gets, or a folder of one; previous: the last before it that keeps documents; null: none
    reads: str | None = PREVIOUS
    keep: bool = True  # whether documents that come out of the last step are written for later stages


@dataclass
class PipelineConfig:
    """A whole pipeline. The YAML may hold further keys of its own, for its steps to refer to as `${key}`."""

    folder: str  # where everything is written, one folder a stage
    stages: dict[str, StageConfig]
    tasks: int = 1  # ranks that the work of a stage is cut into; never changed between attempts
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    accept: list[str] = field(default_factory=list)  # code: go on with what another version of the code has begun
    composed: dict[str, Any] = field(default_factory=dict, repr=False)  # the YAML it was made of


def presets() -> list[str]:
    """The pipelines in `conf/pipeline/`."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_pipeline(name: str, overrides: list[str]) -> PipelineConfig:
    """The pipeline `name` (of `conf/pipeline/`, or a path to a YAML file) with overrides.

    Raises ConfigError, in one sentence, for a name, a choice, a key or a value that is not known, with what was meant.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{name} is not a pipeline{_meant(name, presets())}; there are {', '.join(presets())}, or a path to a YAML file."
        )
    choices, keys = _sorted_out(overrides)
    tree = _composed(path, choices)
    values = _composed(path, [*choices, *(_checked(key, value, tree) for key, value in keys)])
    return _checked_pipeline(values, name)


def _folder() -> Path:
    return resource_folder("conf") / "pipeline"


def _groups() -> dict[str, list[str]]:
    return {
        group.name: sorted(choice.stem for choice in group.glob("*.yaml"))
        for group in _folder().iterdir()
        if group.is_dir()
    }


def _sorted_out(overrides: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Choices of groups, and pairs of key and value."""
    choices, keys = [], []
    for override in overrides:
        key, value = parsed_override(override)
        known = _groups().get(key)
        if known is None:
            keys.append((key, override.partition("=")[2]))
        elif value in known:
            choices.append(override)
        else:
            raise ConfigError(
                f"{key}={value} is not a choice{_meant(str(value), known)}; {key} can be {', '.join(known)}."
            )
    return choices, keys


def _composed(path: Path, overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    with explained(), initialize_config_dir(str(_folder().resolve()), version_base="1.3"):
        # A file from anywhere may choose among the groups of conf/pipeline, too
        ConfigStore.instance().store(name=_ROOT, node=OmegaConf.load(path))
        composed = compose(_ROOT, overrides)
        if "stages" not in composed:
            raise ConfigError(f"{path} has no stages: it is not a pipeline.")
        missing = list(_missing(OmegaConf.to_container(composed), ""))
        values = OmegaConf.to_container(composed, resolve=not missing)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()} | ({"???": missing} if missing else {})


def _missing(values: Any, where: str) -> Iterator[str]:
    """The keys that are `???`. OmegaConf looks for them too, but not if another key refers to one."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _missing(value, f"{where}.{key}" if where else str(key))
    elif values == "???":
        yield where


def _checked(key: str, value: str, tree: dict[str, Any]) -> str:
    """The override of a key for Hydra, spelled out if it began with the name of a step. Raises ConfigError for an unknown key."""
    path = key.split(".")
    if path[0] not in tree and path[0] not in _names(PipelineConfig):
        owners = [stage for stage, given in tree["stages"].items() if path[0] in given["steps"]]
        if len(owners) > 1:
            raise ConfigError(
                f"{key} could mean a step of the stages {' and '.join(owners)}: write stages.{owners[0]}.steps.{key}."
            )
        path = ["stages", *owners, "steps", *path] if owners else path
    if not _known(path, tree):
        raise ConfigError(f"{key} is not a key of this pipeline{_meant(key, sorted(set(_all_keys(tree))))}.")
    return f"++{'.'.join(path)}={value}"


def _known(path: list[str], tree: dict[str, Any]) -> bool:
    node: Any = tree
    for depth, name in enumerate(path):
        if isinstance(node, dict) and name in node:
            node = node[name]
            continue
        names, is_open = _more_names(path[:depth], tree)
        return name in names and (depth == len(path) - 1 or is_open(name))
    return True


def _more_names(path: list[str], tree: dict[str, Any]) -> tuple[list[str], Any]:
    """The keys that may be added at a place of the tree, and whether there is more below one of them."""
    if not path:
        return _names(PipelineConfig), lambda name: False
    if path == ["executor"]:
        return _names(ExecutorConfig), lambda name: name == "sbatch_args"
    if path == ["executor", "sbatch_args"]:
        return [], lambda name: True
    if path[0] == "stages" and len(path) == 2:
        return _names(StageConfig), lambda name: False
    if path[0] == "stages" and len(path) == 4:
        hints = parameters(step_class(path[3], tree["stages"][path[1]]["steps"][path[3]] or {}))
        return list(hints), lambda name: "dict" in str(hints[name].annotation)
    return [], lambda name: False


def _all_keys(tree: dict[str, Any]) -> Iterator[str]:
    """Every key that can be set, those of steps in their short form, too."""
    for key, value in tree.items():
        yield key
        if isinstance(value, dict) and key != "stages":
            yield from (f"{key}.{inner}" for inner in value)
    yield from _names(PipelineConfig)
    yield from (f"executor.{name}" for name in _names(ExecutorConfig))
    for stage, given in tree["stages"].items():
        yield from (f"stages.{stage}.{name}" for name in _names(StageConfig))
        for step, options in given["steps"].items():
            for name in parameters(step_class(step, options or {})):
                yield f"{step}.{name}"
                yield f"stages.{stage}.steps.{step}.{name}"


def _names(kind: type) -> list[str]:
    return [entry.name for entry in fields(kind) if entry.name != "composed"]


def _checked_pipeline(values: dict[str, Any], name: str) -> PipelineConfig:
    if missing := values.get("???"):
        raise ConfigError(f"{missing[0]} of the pipeline {name} is not set: add {missing[0]}=...")
    stages = {stage: _stage(stage, given) for stage, given in values["stages"].items()}
    known = {key: value for key, value in values.items() if key in _names(PipelineConfig)}
    known["executor"] = _section(ExecutorConfig, values.get("executor") or {}, "executor")
    config = _section(PipelineConfig, {**known, "stages": stages, "composed": values}, "")
    _check_limits(config)
    return config


def _stage(stage: str, given: Any) -> StageConfig:
    if not stage.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(
            f"stages.{stage}: the name of a stage is that of its folder, so it has letters, digits, - and _ only."
        )
    found = _section(StageConfig, given, f"stages.{stage}")
    found.steps = {step: dict(options or {}) for step, options in (found.steps or {}).items()}
    for step, options in found.steps.items():
        check_options(step, options)
    return found


def _section(kind: type, given: Any, where: str) -> Any:
    """A dataclass of the values, their types checked."""
    from omegaconf import OmegaConf

    names = [entry.name for entry in fields(kind)]
    prefix = f"{where}." if where else ""
    for name in given or {}:
        if name not in names:
            raise ConfigError(f"{prefix}{name} is not a key{_meant(name, names)}.")
    if kind is not ExecutorConfig:
        lacking = [name for name in ("folder", "stages", "steps") if name in names and not (given or {}).get(name)]
        if lacking:
            raise ConfigError(f"{prefix}{lacking[0]} is not set.")
        return kind(**given)
    with explained():
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))


def _check_limits(config: PipelineConfig) -> None:
    executor = config.executor
    if executor.kind not in EXECUTORS:
        raise ConfigError(f"executor.kind={executor.kind} is not an executor: local, slurm or ray.")
    if executor.kind == "slurm" and not executor.partition:
        raise ConfigError("executor=slurm needs executor.partition=NAME (sinfo lists them).")
    numbers = {f"executor.{name}": getattr(executor, name) for name in ("workers", "cpus_per_task", "tasks_per_job")}
    numbers |= {"tasks": config.tasks}
    numbers |= {f"stages.{name}.tasks": stage.tasks for name, stage in config.stages.items() if stage.tasks is not None}
    for key, number in numbers.items():
        unlimited = number == -1 and key == "executor.workers" and executor.kind == "slurm"
        if not unlimited and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ConfigError(f"{key}={number} is not a number of at least 1.")
    for word in config.accept:
        if word != "code":
            raise ConfigError(f"accept=[{word}] is not known: only code can be accepted to differ.")


def _meant(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        leaf = word.rsplit(".", 1)[-1]
        close = [key for key in known if key.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(
            leaf, [key.rsplit(".", 1)[-1] for key in known], n=1
        )
    return f", did you mean {close[0]}" if close else ""
