"""A whole pipeline: its stages in order, each finished before the next begins; run again it goes on where it was."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_pipelines.frame.config import PREVIOUS, PipelineConfig, StageConfig
from data_pipelines.frame.manifest import check_manifest, manifest_of
from data_pipelines.frame.rank import Stage
from data_pipelines.frame.statistics import Ledger, merged
from data_pipelines.frame.store import write_json
from m4train.errors import ConfigError
from m4train.exits import COMPLETE, FAILED
from m4train.terminal import console

PIPELINE = "pipeline.json"  # in the folder of a pipeline: what it was composed of
STATISTICS = "statistics.json"  # in the folder of a stage: of all its ranks
_JOBS = "jobs.json"
_POLL = 2.0  # seconds between two looks at SLURM's queue


def run_pipeline(config: PipelineConfig) -> int:
    """Runs what is missing of all stages; returns the exit code: 1 if ranks failed, after all others of their stage are done.

    Raises ConfigError if the folder was begun with something else, or another process works in it.
    """
    root = Path(config.folder).absolute()
    stages = stages_of(config, root)
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        if config.executor.kind == "slurm":
            return _submit(stages, config)
        for stage in stages:
            _begin(stage, config)
            if stage.missing():
                _run(stage, config)
            if not _closed(stage):
                return FAILED
    return COMPLETE


def stages_of(config: PipelineConfig, root: Path) -> list[Stage]:
    """The stages with the folders they read. Raises ConfigError for a stage that is not before the one that reads it."""
    stages: list[Stage] = []
    kept: list[str] = []
    for name, given in config.stages.items():
        stages.append(
            Stage(root, name, given.steps, given.tasks or config.tasks, _reads(name, given, kept, root), given.keep)
        )
        if given.keep:
            kept.append(name)
    return stages


def _reads(name: str, given: StageConfig, kept: list[str], root: Path) -> Path | None:
    if given.reads == PREVIOUS:
        return root / kept[-1] if kept else None
    if given.reads is None:
        return None
    if given.reads in kept:
        return root / given.reads
    if Path(given.reads).is_dir():
        return Path(given.reads).absolute()
    raise ConfigError(
        f"stages.{name}.reads={given.reads} is neither a stage before it that keeps documents ({', '.join(kept) or 'none'}) nor a folder."
    )


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    try:
        with FileLock(root / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"another process works on the pipeline in {root}: wait for it, or choose another folder."
        ) from None


def _begin(stage: Stage, config: PipelineConfig) -> None:
    """Checks a stage against what it was begun with."""
    steps = stage.build()
    manifest = manifest_of(steps, stage.steps, stage.tasks, stage.reads, stage.keep)
    check_manifest(stage.folder, json.loads(json.dumps(manifest, default=str)), config.accept)
    if not (stage.root / PIPELINE).is_file():
        write_json(stage.root / PIPELINE, config.composed)


def _run(stage: Stage, config: PipelineConfig, depends: Any = None) -> Any:
    from data_pipelines.frame.executors import executor_of

    (stage.folder / STATISTICS).unlink(missing_ok=True)
    executor = executor_of(stage, config.executor, depends)
    executor.run()
    return executor


def _closed(stage: Stage) -> bool:
    """Whether all ranks of a stage are done; its numbers are merged and told, or the ranks that failed."""
    missing, failures = stage.missing(), stage.failures()
    if missing:
        console(stderr=True).print(
            f"{stage.name}: {len(missing)} of {stage.tasks} ranks are not done; {_told(failures, stage)}"
        )
        return False
    ledgers = merged(stage.folder)
    if not (stage.folder / STATISTICS).is_file():
        write_json(stage.folder / STATISTICS, [ledger.to_dict() for ledger in ledgers])
    for ledger in ledgers:
        console().print(_line(stage, ledger), soft_wrap=True)
    return True


def _told(failures: dict[int, str], stage: Stage) -> str:
    if not failures:
        return "run the same command again."
    rank, error = next(iter(failures.items()))
    return f"rank {rank}: {error} (see {stage.folder / 'failures'}). The same command runs them again."


def _line(stage: Stage, ledger: Ledger) -> str:
    before, after = ledger.before, ledger.after
    line = f"{stage.name}/{ledger.name}: {before['documents']} -> {after['documents']} documents, {before['images']} -> {after['images']} images"
    counts = ", ".join(f"{label} {number}" for label, number in sorted(ledger.counts.items()))
    return f"{line} ({counts})" if counts else line


def _submit(stages: list[Stage], config: PipelineConfig) -> int:
    """Submits the stages that are not done as jobs that wait for each other."""
    active = [job for stage in stages for job in _jobs(stage)]
    if running := [job for job in active if _is_active(job)]:
        raise ConfigError(
            f"SLURM jobs of this pipeline are not finished ({', '.join(running)}): wait for them, or scancel them."
        )
    before: Any = None
    for stage in stages:
        _begin(stage, config)
        if not stage.missing():
            _closed(stage)
            continue
        try:
            before = _run(stage, config, before)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(
                f"SLURM did not take the jobs of stage {stage.name}: {error}; what sbatch says is above."
            ) from None
        write_json(stage.folder / _JOBS, [str(before.job_id)])
        console().print(f"{stage.name}: {len(stage.missing())} ranks submitted as job {before.job_id}", soft_wrap=True)
    if before is None or not config.executor.wait:
        return COMPLETE
    while any(_is_active(job) for stage in stages for job in _jobs(stage)):
        time.sleep(_POLL)
    closed = [_closed(stage) for stage in stages]  # each says how it went
    return COMPLETE if all(closed) else FAILED


def _jobs(stage: Stage) -> list[str]:
    path = stage.folder / _JOBS
    return json.loads(path.read_text()) if path.is_file() else []


def _is_active(job: str) -> bool:
    """Whether a job is waiting for something that can still come, or running."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format=%T %r"], capture_output=True, text=True)
    lines = asked.stdout.splitlines() if not asked.returncode else []
    return any("DependencyNeverSatisfied" not in line for line in lines)
